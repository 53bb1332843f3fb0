"""Tile sizes of the Triton kernels, by target. Every row is compiled and held to its budget (:mod:`fused.compile`)."""

from typing import NamedTuple

import torch


class Tiles(NamedTuple):
    """Queries and keys of a tile, warps of a program, stages of the software pipeline.

    With ``descriptors`` tensors are read and written through tensor descriptors where their strides allow it. With
    ``split`` the backward has a loop of its own for tiles that need no mask; one loop for all takes fewer registers.
    """

    block_q: int
    block_k: int
    warps: int
    stages: int
    descriptors: bool = False
    split: bool = False


class Target(NamedTuple):
    """A GPU to compile for, and the shared memory that one program of it can have, in bytes."""

    backend: str
    arch: int | str
    warp: int
    shared: int


KERNELS = ("forward", "backward", "query")
WIDTHS = (64, 128, 256)
ELEMENT_BYTES = (2, 4)

TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024),
    "sm_90": Target("cuda", 90, 32, 227 * 1024),
    "sm_100": Target("cuda", 100, 32, 227 * 1024),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024),
}

# (kernel, bytes of an element, head width up to) -> tiles, for each target
TILES: dict[str, dict[tuple[str, int, int], Tiles]] = {}


def tiles(target: str, kernel: str, element_bytes: int, width: int) -> Tiles:
    """The tiles for heads of ``width``, the larger of the key and the value width padded to a power of two."""
    return TILES[target][kernel, element_bytes, max(width, WIDTHS[0])]


def target_of(device: torch.device) -> str:
    """The target whose tiles a device gets: its own, or the one whose instructions it shares."""
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")
