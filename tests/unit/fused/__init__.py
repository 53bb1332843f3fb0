"""The block primitive against its oracle."""
