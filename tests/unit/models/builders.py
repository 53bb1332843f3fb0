"""Small random models for the tests."""

from dataclasses import replace

import torch
from torch import Tensor

from models.decoder import Decoder, ModelSpec

SMALL = ModelSpec(vocab_size=97, dim=48, layers=3, heads=4, kv_heads=2, head_dim=12, ffn_dim=80, init_std=0.2)


def small_model(seed: int = 0, **changes: object) -> Decoder:
    return Decoder(replace(SMALL, **changes)).initialise(seed)  # pyright: ignore[reportArgumentType]


def random_batch(batch: int, length: int, vocab: int = SMALL.vocab_size, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(tokens, positions), each [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab, (batch, length), generator=generator)
    return tokens, torch.arange(length).expand(batch, length)
