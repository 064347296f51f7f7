"""Prompts with graders: reasoning-gym families, files and datasets, and the compiler of worked solutions."""
