"""Tests over several gloo processes."""
