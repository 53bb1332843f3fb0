"""What `sundog evaluate` measures: each task is a file."""
