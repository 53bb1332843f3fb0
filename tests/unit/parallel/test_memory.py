"""The memory that a rank needs besides its own shards does not grow with the number of ranks."""

import threading
from typing import Any

import pytest
from torch import Tensor

from fused.mask import FULL
from parallel.ring import engine
from parallel.ring.schedule import INPUTS
from tests.helpers.attention import Case, MemoryChannel, run_in_memory


def _bytes(tensors: list[Tensor]) -> int:
    return sum(x.untyped_storage().nbytes() for x in tensors)


class _Peak:
    """The most bytes of other ranks' tensors that any rank holds at the end of a step's exchange or of its blocks."""

    def __init__(self) -> None:
        self.inputs = self.sums = 0
        self._lock = threading.Lock()

    def look(self, run: engine._Run) -> None:
        worker = run._worker
        rank = worker.rules.rank
        inputs = [x for held in worker._inputs.values() for key, h in held.items() if key for x in h.tensors]
        coming: list[Any] = [x for entries in run._inputs.values() for _, found in entries for x in found]
        sums = [x for key, total in worker._sums.items() if key[1] != rank for x in total.tensors]
        coming_sums: list[Any] = [x for found in run._sums.values() for x in found]
        for message, found in (entry for entries in run._coming.values() for entry in entries):
            (coming if message.kind in INPUTS else coming_sums).extend(found)
        inputs, sums = inputs + [x.delivery.tensor for x in coming], sums + [x.delivery.tensor for x in coming_sums]
        with self._lock:
            self.inputs, self.sums = max(self.inputs, _bytes(inputs)), max(self.sums, _bytes(sums))


@pytest.mark.parametrize("name", ["ring", "bidirectional_ring", "token_ring", "bidirectional_query"])
def test_two_blocks_in_flight_for_any_number_of_ranks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real_exchange, real_step = engine._Run._exchange, engine._Run.step
    peaks: dict[int, _Peak] = {}
    for ranks in (2, 4, 8):
        peak = peaks[ranks] = _Peak()

        def exchange(run: engine._Run, number: int, peak: _Peak = peak) -> None:
            real_exchange(run, number)
            peak.look(run)

        def finish(run: engine._Run, index: int, dead: tuple[object, ...], peak: _Peak = peak) -> None:
            real_step(run, index, dead)  # pyright: ignore[reportArgumentType]
            peak.look(run)

        monkeypatch.setattr(engine._Run, "_exchange", exchange)
        monkeypatch.setattr(engine._Run, "step", finish)
        run_in_memory(Case(name, ranks, layout="contiguous", mask=FULL, keys=16 * ranks, kv_heads=4, batch=1))
    bundle = 16 * 4 * (2 * 8 + 2) * 4  # queries, gradients of the output and statistics of one shard
    keys = 2 * 16 * 4 * 8 * 4
    for ranks, peak in peaks.items():
        assert peak.inputs <= 2 * max(bundle, keys), ranks
        assert peak.sums <= 2 * max(bundle, keys), ranks
    assert peaks[8].inputs == peaks[4].inputs
    assert peaks[8].sums == peaks[4].sums


@pytest.mark.parametrize(("name", "early"), [("allgather", True), ("allgather", False), ("token_ring", True)])
def test_receives_are_posted_as_far_ahead_as_sends_may_be_on_their_way(
    name: str, early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 of four: where everything may travel at once, all receives are posted before the first send."""
    log: list[str] = []
    real_receive, real_send = MemoryChannel.receive, MemoryChannel.send

    def receive(channel: MemoryChannel, peer: int, tensors: Any) -> Any:
        log.append("receive") if channel.rank == 0 else None
        return real_receive(channel, peer, tensors)

    def send(channel: MemoryChannel, parcels: Any) -> None:
        log.append("send") if channel.rank == 0 and parcels else None
        real_send(channel, parcels)

    monkeypatch.setattr(MemoryChannel, "receive", receive)
    monkeypatch.setattr(MemoryChannel, "send", send)
    monkeypatch.setattr(MemoryChannel, "early", property(lambda _: early))
    run_in_memory(Case(name, 4, layout="contiguous", mask=FULL, keys=64, kv_heads=4, batch=1))
    backward = log[4:] if name == "allgather" else log[log.index("send") :]
    if name == "allgather":
        assert log[:4] == ["receive"] * 3 + ["send"]
        assert backward.index("send") == (6 if early else 3)  # keys and values of three, and their gradients
    else:
        assert backward.index("receive") == 1  # one exchange at a time
