"""Small models of experts and a synthetic corpus of two modalities, for the tests."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from models.decoder import Decoder, ModelSpec
from models.spec import ExpertSpec
from tests.unit.models.builders import SMALL

IMAGE_TOKENS = 32
TWO = replace(SMALL, modalities=("text", "image"), modality_tokens=(IMAGE_TOKENS,))


def moe_spec(groups: tuple[int, ...] = (4, 4), norm: str = "pre", depth: float = 1.0, **experts: Any) -> ModelSpec:
    return replace(TWO, norm=norm, depth=depth, experts=ExpertSpec(groups=groups, **experts))


def moe_model(seed: int = 0, **changes: Any) -> Decoder:
    return Decoder(moe_spec(**changes)).initialise(seed)


def mixed_tokens(batch: int, length: int, text: float = 0.5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Runs of text ids and of discrete image ids that alternate, ``text`` of them text: (tokens, positions)."""
    generator = torch.Generator().manual_seed(seed)
    first = SMALL.vocab_size - IMAGE_TOKENS
    words = torch.randint(0, first, (batch, length), generator=generator)
    codes = torch.randint(first, SMALL.vocab_size, (batch, length), generator=generator)
    runs = torch.rand(batch, -(-length // 5), generator=generator).repeat_interleave(5, 1)[:, :length]
    cut = runs.flatten().sort().values[min(round(text * runs.numel()), runs.numel() - 1)]
    is_text = torch.ones_like(runs, dtype=torch.bool) if text == 1 else runs < cut
    return words.where(is_text, codes), torch.arange(length).expand(batch, length)
