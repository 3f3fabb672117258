"""What helps to test applications."""
