"""Parallelism applied to a model from outside: mesh, sequence parallelism, sharding."""
