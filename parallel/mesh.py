"""The ranks as a grid: axes for replicas, for shards of parameters and for parts of a sequence."""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from conf.errors import ConfigError
from conf.rules import MeshSizes

AXES = ("dp_replicate", "dp_shard", "cp")
FSDP_AXES = ("dp_replicate", "dp_shard_cp")
EXPERT_AXES = ("dp_replicate", "edp", "ep")


@dataclass(frozen=True)
class Mesh:
    """``dp_replicate x dp_shard x cp`` ranks; ``cp`` varies fastest, so the ranks of one sequence are neighbours.

    Ranks of one ``cp`` group hold parts of the same windows. Ranks that differ in ``dp_replicate`` or ``dp_shard`` read
    different windows. Parameters are equal over ``dp_replicate`` and sharded over ``dp_shard`` and ``cp`` together.
    """

    sizes: MeshSizes
    device_mesh: DeviceMesh
    fsdp: DeviceMesh  # the same ranks as (dp_replicate, dp_shard_cp), or (dp_shard_cp,) where there is one replica
    experts: DeviceMesh  # where ep > 1, the same ranks as (dp_replicate, edp, ep): edp ranks hold the same experts

    @property
    def expert_fsdp(self) -> DeviceMesh:
        """The ranks that hold copies of the same experts."""
        return self.experts["edp"] if self.sizes.dp_replicate == 1 else self.experts["dp_replicate", "edp"]

    @property
    def cp_group(self) -> dist.ProcessGroup:
        """The ranks that share one sequence, in order."""
        return self.device_mesh.get_group("cp")

    @property
    def cp_size(self) -> int:
        return self.sizes.cp

    @property
    def cp_rank(self) -> int:
        return self.device_mesh.get_local_rank("cp")

    @property
    def dp_size(self) -> int:
        """How many groups read different windows."""
        return self.sizes.dp

    @property
    def dp_rank(self) -> int:
        replicate = self.device_mesh.get_local_rank("dp_replicate")
        return replicate * self.sizes.dp_shard + self.device_mesh.get_local_rank("dp_shard")

    @property
    def size(self) -> int:
        return self.sizes.ranks


def build_mesh(sizes: MeshSizes, device_type: str) -> Mesh:
    """Arrange all ranks of the default process group. Collective; its groups take over that group's timeout.

    Raises:
        ConfigError: the sizes do not multiply to the number of ranks.
    """
    world_size = dist.get_world_size()
    if sizes.ranks != world_size:
        raise ConfigError(
            "mesh",
            f"{sizes.dp_replicate} x {sizes.dp_shard} x {sizes.cp}",
            f"dp_replicate x dp_shard x cp is the number of ranks, {world_size}",
            "change sharding.dp_replicate, sharding.dp_shard, sequence.degree or cluster.ranks",
        )
    shape = (sizes.dp_replicate, sizes.dp_shard, sizes.cp)
    device_mesh = init_device_mesh(device_type, shape, mesh_dim_names=AXES)
    fsdp_shape = (sizes.dp_replicate, sizes.dp_shard * sizes.cp)
    skip = 1 if sizes.dp_replicate == 1 else 0
    fsdp = init_device_mesh(device_type, fsdp_shape[skip:], mesh_dim_names=FSDP_AXES[skip:])
    expert_shape = (sizes.dp_replicate, sizes.dp_shard * sizes.cp // sizes.ep, sizes.ep)
    experts = init_device_mesh(device_type, expert_shape, mesh_dim_names=EXPERT_AXES) if sizes.ep > 1 else device_mesh
    return Mesh(sizes, device_mesh, fsdp, experts)
