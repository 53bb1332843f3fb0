"""Tile sizes of the Triton kernels, by target. Every row is compiled and held to its budget (:mod:`fused.compile`)."""

from typing import NamedTuple

import torch

from conf.errors import ConfigError


class Tiles(NamedTuple):
    """Queries and keys of a tile, warps of a program, stages of the software pipeline.

    With ``descriptors`` tensors are read and written through tensor descriptors where their strides allow it. With
    ``split`` there is a loop of its own for tiles that need no mask; one loop for all takes fewer registers.
    """

    block_q: int
    block_k: int
    warps: int
    stages: int
    descriptors: bool = False
    split: bool = False


class ExpertTiles(NamedTuple):
    """Rows, columns and summands of a tile of a product with experts' weights, warps and pipeline stages.

    Kernels that compute a SwiGLU hold several tiles at once and have ``swiglu_n`` columns.
    """

    block_m: int
    block_n: int
    swiglu_n: int
    block_k: int
    warps: int
    stages: int


class Target(NamedTuple):
    """A GPU to compile for, and the shared memory that one program of it can have, in bytes."""

    backend: str
    arch: int | str
    warp: int
    shared: int


KERNELS = ("forward", "backward", "query")
EXPERT_KERNELS = ("experts_hidden", "experts_product", "experts_combine", "experts_backward", "experts_weight")
WIDTHS = (64, 128, 256)
ELEMENT_BYTES = (2, 4)

TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024),
    "sm_90": Target("cuda", 90, 32, 227 * 1024),
    "sm_100": Target("cuda", 100, 32, 227 * 1024),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024),
}

# (kernel, bytes of an element, head width up to) -> tiles, for each target. 4 bytes are for checking: exact fp32
# products, for which NVIDIA has no matrix units.
TILES: dict[str, dict[tuple[str, int, int], Tiles]] = {
    "sm_90": {
        ("forward", 2, 64): Tiles(128, 128, 8, 2, True, True),
        ("forward", 2, 128): Tiles(128, 64, 8, 3, True, True),
        ("forward", 2, 256): Tiles(128, 32, 8, 2, True, True),
        ("backward", 2, 64): Tiles(128, 64, 8, 2, True, True),
        ("backward", 2, 128): Tiles(128, 64, 8, 1, True),
        ("backward", 2, 256): Tiles(32, 32, 8, 1),
        ("query", 2, 64): Tiles(128, 64, 8, 2, True, True),
        ("query", 2, 128): Tiles(128, 64, 8, 2, True, True),
        ("query", 2, 256): Tiles(32, 32, 8, 1),
        ("forward", 4, 64): Tiles(32, 32, 8, 1),
        ("forward", 4, 128): Tiles(32, 16, 8, 1),
        ("forward", 4, 256): Tiles(16, 16, 8, 1),
        ("backward", 4, 64): Tiles(32, 32, 4, 1, True),
        ("backward", 4, 128): Tiles(32, 32, 8, 1, True),
        ("backward", 4, 256): Tiles(32, 16, 8, 1, True),
        ("query", 4, 64): Tiles(32, 32, 4, 1),
        ("query", 4, 128): Tiles(32, 32, 8, 1),
        ("query", 4, 256): Tiles(32, 16, 8, 1),
    },
    "sm_80": {
        ("forward", 2, 64): Tiles(128, 64, 8, 3, split=True),
        ("forward", 2, 128): Tiles(128, 32, 8, 3, split=True),
        ("forward", 2, 256): Tiles(64, 32, 8, 2),
        ("backward", 2, 64): Tiles(64, 64, 8, 1),
        ("backward", 2, 128): Tiles(64, 64, 8, 1),
        ("backward", 2, 256): Tiles(32, 32, 8, 1),
        ("query", 2, 64): Tiles(64, 64, 8, 2),
        ("query", 2, 128): Tiles(64, 32, 8, 2),
        ("query", 2, 256): Tiles(32, 32, 8, 1),
        ("forward", 4, 64): Tiles(32, 32, 8, 1),
        ("forward", 4, 128): Tiles(32, 16, 8, 1),
        ("forward", 4, 256): Tiles(16, 16, 8, 1),
        ("backward", 4, 64): Tiles(32, 32, 8, 1),
        ("backward", 4, 128): Tiles(32, 16, 8, 1),
        ("backward", 4, 256): Tiles(16, 16, 8, 1),
        ("query", 4, 64): Tiles(32, 32, 4, 1),
        ("query", 4, 128): Tiles(32, 32, 8, 1),
        ("query", 4, 256): Tiles(32, 16, 8, 1),
    },
    "sm_100": {
        ("forward", 2, 64): Tiles(128, 128, 8, 2, True, True),
        ("forward", 2, 128): Tiles(128, 64, 8, 3, True, True),
        ("forward", 2, 256): Tiles(128, 32, 8, 2, True, True),
        ("backward", 2, 64): Tiles(128, 64, 8, 1, True),
        ("backward", 2, 128): Tiles(128, 64, 8, 1, True),
        ("backward", 2, 256): Tiles(32, 32, 8, 1),
        ("query", 2, 64): Tiles(128, 64, 8, 2, True, True),
        ("query", 2, 128): Tiles(128, 64, 8, 2, True, True),
        ("query", 2, 256): Tiles(64, 32, 8, 1, True),
        ("forward", 4, 64): Tiles(32, 32, 8, 1),
        ("forward", 4, 128): Tiles(32, 16, 8, 1),
        ("forward", 4, 256): Tiles(16, 16, 8, 1),
        ("backward", 4, 64): Tiles(32, 32, 4, 1, True),
        ("backward", 4, 128): Tiles(32, 32, 8, 1, True),
        ("backward", 4, 256): Tiles(32, 16, 8, 1, True),
        ("query", 4, 64): Tiles(32, 32, 4, 1),
        ("query", 4, 128): Tiles(32, 32, 8, 1),
        ("query", 4, 256): Tiles(32, 16, 8, 1),
    },
    "gfx942": {
        ("forward", 2, 64): Tiles(128, 64, 4, 2, split=True),
        ("forward", 2, 128): Tiles(128, 64, 4, 2, split=True),
        ("forward", 2, 256): Tiles(64, 32, 4, 1),
        ("backward", 2, 64): Tiles(64, 64, 4, 1),
        ("backward", 2, 128): Tiles(64, 64, 4, 1),
        ("backward", 2, 256): Tiles(32, 32, 4, 1),
        ("query", 2, 64): Tiles(64, 64, 4, 1),
        ("query", 2, 128): Tiles(64, 32, 4, 1),
        ("query", 2, 256): Tiles(32, 32, 4, 1),
        ("forward", 4, 64): Tiles(32, 32, 4, 1),
        ("forward", 4, 128): Tiles(32, 32, 4, 1),
        ("forward", 4, 256): Tiles(16, 16, 4, 1),
        ("backward", 4, 64): Tiles(32, 32, 4, 1),
        ("backward", 4, 128): Tiles(32, 32, 4, 1),
        ("backward", 4, 256): Tiles(16, 16, 4, 1),
        ("query", 4, 64): Tiles(32, 32, 4, 1),
        ("query", 4, 128): Tiles(32, 32, 4, 1),
        ("query", 4, 256): Tiles(16, 16, 4, 1),
    },
}


# Bytes of an element -> tiles of the experts' kernels, for each target.
EXPERT_TILES: dict[str, dict[int, ExpertTiles]] = {
    "sm_80": {2: ExpertTiles(128, 128, 64, 32, 8, 3), 4: ExpertTiles(32, 32, 32, 16, 4, 2)},
    "sm_90": {2: ExpertTiles(128, 128, 64, 32, 8, 4), 4: ExpertTiles(32, 32, 32, 16, 4, 2)},
    "sm_100": {2: ExpertTiles(128, 128, 64, 64, 8, 3), 4: ExpertTiles(32, 32, 32, 16, 4, 2)},
    "gfx942": {2: ExpertTiles(128, 128, 64, 32, 8, 2), 4: ExpertTiles(32, 32, 32, 16, 4, 1)},
}


def expert_tiles(target: str, element_bytes: int) -> ExpertTiles:
    """The tiles of the experts' kernels."""
    return EXPERT_TILES[target][element_bytes]


def tiles(target: str, kernel: str, element_bytes: int, width: int) -> Tiles:
    """The tiles for heads of ``width``, the larger of the key and the value width padded to a power of two."""
    if width > WIDTHS[-1]:
        rule, fix = f"attention kernels take heads of up to {WIDTHS[-1]}", "more heads, or narrower ones"
        raise ConfigError("model.head_dim", width, rule, fix)
    return TILES[target][kernel, element_bytes, max(width, WIDTHS[0])]


def target_of(device: torch.device) -> str:
    """The target whose tiles a device gets: its own, or the one whose instructions it shares."""
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")
