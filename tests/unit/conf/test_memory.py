"""What ``sundog plan`` says of memory beside what torch's allocator reports (``benchmarks.memory`` has a grid)."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from benchmarks import memory
from benchmarks.memory import BOUND, Case, Size, train
from conf.memory import memory_per_rank
from conf.schema import RunConfig


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# Each is another moment's peak: activations with the loss, one block computed again, the embedding's gradient.
CASES = [
    *(Case("long", 256, 2, recompute=kind) for kind in ("none", "selective", "full")),
    Case("table", 64, 1),
    Case("table", 64, 1, accumulate=2),
    Case("long", 256, 1, precision="bf16"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_peak_is_predicted(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(memory.SIZES, "long", Size(64, 4, 4, 2, 512))
    monkeypatch.setitem(memory.SIZES, "table", Size(128, 2, 4, 4, 4096))
    config = case.config(tmp_path)
    (measured,) = train(0, 1, [config])
    assert memory_per_rank(config, config.data.vocab_size).total == pytest.approx(measured, rel=BOUND)


def test_more_ranks_take_less_where_state_is_spread() -> None:
    config = RunConfig()
    config.cluster.ranks, config.sequence.degree = 8, 2

    def total(kind: str) -> int:
        config.sharding.kind = kind
        return memory_per_rank(config, 4096).total

    assert total("fsdp") < total("zero2") <= total("zero1") < total("ddp")
    few = total("fsdp")
    config.cluster.ranks = 2
    assert total("fsdp") > few
