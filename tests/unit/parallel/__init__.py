"""Sequence and data parallelism on one process."""
