"""The timeline of attention in one optimizer step, from all ranks of a sequence, for ``report`` to draw."""

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data.files import write_atomic
from parallel.mesh import Mesh
from parallel.ring.trace import Recorder, TracedCall
from trainers.report import TIMELINE_FILE


def exposed(recorder: Recorder) -> dict[str, float]:
    """The metric of a recorded step on this rank."""
    return {"ring/exposed_comm_ms": 1e3 * recorder.waited}


def _spans(call: TracedCall) -> list[tuple[str, float, float]]:
    return [(span.activity, round(1e3 * span.start, 3), round(1e3 * span.end, 3)) for span in call.spans]


def save_timeline(recorder: Recorder, run_dir: str, step: int, mesh: Mesh) -> None:
    """Write the last forward and the last backward call of every rank of the first sequence, in milliseconds since each
    rank's call began. Collective."""
    mine: dict[str, Any] = {call.direction: _spans(call) for call in recorder.calls}
    everyone: list[Any] = [None] * mesh.cp_size
    dist.all_gather_object(everyone, mine, group=mesh.cp_group)
    if dist.get_rank() == 0:
        record = {"step": step, "ranks": everyone}
        write_atomic(Path(run_dir) / TIMELINE_FILE, json.dumps(record) + "\n")
