"""Shared core of teachers and students, and the entry point `distill/run.py`."""
