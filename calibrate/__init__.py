"""Running a model to learn from it, and compressing it."""
