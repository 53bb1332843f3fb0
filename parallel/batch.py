"""This rank's part of the windows of its data-parallel group."""

from torch import Tensor

from parallel.layout import shard
from parallel.mesh import Mesh


def shard_batch(batch: dict[str, Tensor], mesh: Mesh, layout: str) -> dict[str, Tensor]:
    """Cut every tensor ``[windows, context]`` to the tokens ``[windows, context / cp]`` that this rank holds.

    Labels and positions have to be made for the whole window first: cut together with the tokens they stay right.

    Raises:
        ConfigError: the layout cannot cut the context evenly over the ranks of ``cp``.
    """
    return {name: shard(tensor, 1, mesh.cp_size, mesh.cp_rank, layout) for name, tensor in batch.items()}
