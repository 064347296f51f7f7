"""Triton kernels of the teacher's forward pass and draw; teachers.plain holds the same functions in plain torch."""
