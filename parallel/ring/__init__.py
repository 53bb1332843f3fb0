"""Sequence parallelism as schedules: one file a strategy, a checker for all of them, one engine that runs them."""
