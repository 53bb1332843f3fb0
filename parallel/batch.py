"""This rank's part of the windows of its data-parallel group."""

from torch import Tensor

from parallel.layout import named_layout
from parallel.mesh import Mesh


def shard_batch(batch: dict[str, Tensor], mesh: Mesh, layout: str) -> dict[str, Tensor]:
    """Cut every tensor ``[windows, context]`` to the tokens ``[windows, context / cp]`` that this rank holds.

    Labels and positions have to be made for the whole window first: cut together with the tokens they stay right.
    """
    return {
        name: named_layout(layout, tensor.shape[1], mesh.cp_size).shard(tensor, 1, mesh.cp_rank)
        for name, tensor in batch.items()
    }
