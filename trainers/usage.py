"""What every rank's process takes of its machine: memory and processor time."""

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

_PAGE = os.sysconf("SC_PAGE_SIZE")


class Usage:
    """Memory now, and processor time since the last look, of all ranks of ``group`` (gloo)."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._wall, self._cpu = time.monotonic(), time.process_time()

    def of_all_ranks(self) -> dict[str, float]:
        """Return the metrics of every rank by its number. Collective."""
        wall, cpu = time.monotonic(), time.process_time()
        share = 100 * (cpu - self._cpu) / max(wall - self._wall, 1e-9)
        self._wall, self._cpu = wall, cpu
        own = torch.tensor([resident_gb(), share], dtype=torch.float64)
        everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(everyone, own, group=self._group)
        found: dict[str, float] = {}
        for rank, (memory, percent) in enumerate(pair.tolist() for pair in everyone):
            found |= {f"system/memory_gb/{rank}": memory, f"system/cpu_percent/{rank}": percent}
        return found


def resident_gb() -> float:
    """Return the resident memory of this process, in GB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE / 1e9
