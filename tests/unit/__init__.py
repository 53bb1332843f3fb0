"""Fast tests on one process."""
