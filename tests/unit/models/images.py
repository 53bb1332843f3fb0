"""A tiny image tokenizer for tests."""

from data.images import ImageSpec

SPEC = ImageSpec(kind="vq", size=8, channels=1, patch=2, codes=12, width=4, code_dim=3)
