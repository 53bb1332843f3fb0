"""The process that a rank is: its device, its threads and its process groups, from the usual variables."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from conf.errors import ConfigError
from conf.schema import RunConfig

FILE_TIMEOUT_FACTOR = 10  # file systems and trackers get this many times trainer.collective_timeout_sec


@dataclass(frozen=True)
class Runtime:
    """``io_group`` spans all ranks, runs on gloo and has a longer timeout: for waits on files, not on compute.

    ``checkpoint_group`` is like it and for checkpoints alone: a thread uses it while training goes on.
    """

    rank: int
    world_size: int
    device: torch.device
    io_group: dist.ProcessGroup
    checkpoint_group: dist.ProcessGroup


def _environment(config: RunConfig) -> tuple[int, int]:
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != config.cluster.ranks:
        raise ConfigError(
            "cluster.ranks",
            config.cluster.ranks,
            f"it must equal the number of processes that were started, WORLD_SIZE = {world_size}",
            f"cluster.ranks={world_size}",
        )
    return rank, world_size


def _device(config: RunConfig) -> torch.device:
    if config.cluster.gpus_per_rank > 0 and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


@contextmanager
def process_group(config: RunConfig) -> Iterator[Runtime]:
    """Join the other ranks; leave them again at the end, whatever happened.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; without them this is a world of one. A default
    group that exists already is used and left alone. Collectives fail after ``trainer.collective_timeout_sec``.

    Raises:
        ConfigError: the processes started are not as many as ``cluster.ranks``.
    """
    device = _device(config)
    timeout = timedelta(seconds=config.trainer.collective_timeout_sec)
    own = not dist.is_initialized()
    if own:
        rank, world_size = _environment(config)
        torch.set_num_threads(config.cluster.threads_per_rank or max(1, int(config.cluster.cpus_per_rank)))
        store = HashStore() if world_size == 1 else None
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    groups = [_file_group(FILE_TIMEOUT_FACTOR * timeout) for _ in range(2)]
    try:
        yield Runtime(dist.get_rank(), dist.get_world_size(), device, *groups)
    finally:
        if own:
            dist.destroy_process_group()
        else:
            for group in groups:
                dist.destroy_process_group(group)


def _file_group(timeout: timedelta) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup), "every rank belongs to the group of all ranks"
    return group
