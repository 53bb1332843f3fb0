"""Measurements against peers; nothing here is imported by the library."""
