import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore

from conf.errors import DataError, ResourceError
from conf.schema import TrainerConfig
from trainers import checkpoint_folder as files
from trainers.checkpoint import Checkpoints, load_weights
from trainers.optim import build_optimizer

IDENTITY = {"model": {"dim": 4, "layers": 1}, "tokenizer": "tok-a", "shards": "data-a", "stream": {"seed": 0}}


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Trainee:
    """A tiny model with its optimizer and its checkpoints."""

    def __init__(self, folder: Path, keep: int = 2, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Embedding(8, 4), nn.RMSNorm(4), nn.Linear(4, 8, bias=False))
        self.optimizer = build_optimizer(self.model, TrainerConfig())
        self.said: list[str] = []
        assert dist.group.WORLD is not None
        self.checkpoints = Checkpoints(folder, keep, dist.group.WORLD, self.said.append)

    def train(self, steps: int) -> list[float]:
        losses = []
        for step in range(steps):
            tokens = torch.randint(8, (16,), generator=torch.Generator().manual_seed(step))
            loss = nn.functional.cross_entropy(self.model(tokens), tokens)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def save(self, step: int) -> Path:
        tensors = self.checkpoints.snapshot(self.model, self.optimizer)
        return self.checkpoints.save(tensors, {"step": step, "identity": IDENTITY})

    def restore(self, identity: dict[str, Any] | None = None) -> dict[str, Any] | None:
        return self.checkpoints.restore(self.model, self.optimizer, identity or IDENTITY)


def _tensor_file(path: Path) -> Path:
    return next(path.glob("*.distcp"))


def test_training_goes_on_bitwise_after_a_restore(tmp_path: Path) -> None:
    undisturbed = Trainee(tmp_path / "a")
    undisturbed.train(3)
    path = undisturbed.save(3)
    expected = undisturbed.train(5)
    other = Trainee(tmp_path / "a", seed=1)
    state = other.restore()
    assert state is not None
    assert state["step"] == 3
    assert other.train(5) == expected
    assert {"COMPLETE", "state.json", ".metadata"} < {file.name for file in path.iterdir()}


def test_no_checkpoint_is_a_fresh_start(tmp_path: Path) -> None:
    assert Trainee(tmp_path / "none").restore() is None


def test_hyperparameters_are_those_of_the_resuming_run(tmp_path: Path) -> None:
    first = Trainee(tmp_path)
    first.train(1)
    first.save(1)
    second = Trainee(tmp_path)
    for group in second.optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.5, 0.25
    second.restore()
    assert {(group["lr"], group["weight_decay"]) for group in second.optimizer.param_groups} == {(0.5, 0.25)}


def test_retention_keeps_the_newest_and_clears_unfinished_ones(tmp_path: Path) -> None:
    trainee = Trainee(tmp_path, keep=2)
    (tmp_path / "step-000000001.tmp").mkdir(parents=True)
    (tmp_path / "step-000000002").mkdir()  # killed before the marker
    (tmp_path / "notes").mkdir()
    for step in (3, 6, 9):
        trainee.save(step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step-000000006", "step-000000009"]
    assert files.newest_complete(tmp_path) == tmp_path / "step-000000009"


def test_unfinished_saves_are_no_checkpoints(tmp_path: Path) -> None:
    trainee = Trainee(tmp_path)
    trainee.train(1)
    trainee.save(1)
    newer = trainee.save(2)
    newer.rename(tmp_path / "step-000000002.tmp")  # as a kill during the write leaves it
    shutil.copytree(tmp_path / "step-000000001", tmp_path / "step-000000003")
    (tmp_path / "step-000000003" / "COMPLETE").unlink()  # as a kill between rename and marker leaves it
    state = Trainee(tmp_path).restore()
    assert state is not None
    assert state["step"] == 1
    trainee.save(2)
    trainee.save(3)  # over what is in the way
    assert [files.step_of(path) for path in files.complete_checkpoints(tmp_path)] == [3, 2]


def _truncate(path: Path) -> None:
    content = _tensor_file(path).read_bytes()
    _tensor_file(path).write_bytes(content[:-10])


def _flip(path: Path) -> None:
    content = bytearray(_tensor_file(path).read_bytes())
    content[len(content) // 2] ^= 1
    _tensor_file(path).write_bytes(bytes(content))


def _lose(path: Path) -> None:
    _tensor_file(path).unlink()


def _break_state(path: Path) -> None:
    (path / "state.json").write_text("{")


def _break_marker(path: Path) -> None:
    (path / "COMPLETE").write_text('{"files": {"state.json"')


def _empty_marker(path: Path) -> None:
    (path / "COMPLETE").write_text("")


DAMAGES = [_truncate, _flip, _lose, _break_state, _break_marker, _empty_marker]


@pytest.mark.parametrize("harm", DAMAGES)
def test_a_damaged_newest_falls_back_loudly_and_is_moved_aside(tmp_path: Path, harm: Any) -> None:
    trainee = Trainee(tmp_path)
    trainee.train(2)
    trainee.save(2)
    expected = trainee.train(1)
    harm(trainee.save(4))
    other = Trainee(tmp_path, seed=3)
    state = other.restore()
    assert state is not None
    assert state["step"] == 2
    assert other.train(1) == expected
    assert any("step-000000004 is damaged" in line for line in other.said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000002", "step-000000004.corrupt"]


@pytest.mark.parametrize("harm", DAMAGES)
def test_when_none_is_readable_the_run_does_not_start_from_zero(tmp_path: Path, harm: Any) -> None:
    trainee = Trainee(tmp_path)
    for step in (1, 2):
        harm(trainee.save(step))
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(DataError, match="never silently starts again"):
        trainee.restore()
    assert sorted(path.name for path in tmp_path.iterdir()) == before, "nothing was touched"


@pytest.mark.parametrize(
    ("part", "value", "named"),
    [
        ("model", {"dim": 8, "layers": 1}, "dim: 4 != 8"),
        ("tokenizer", "tok-b", "tok-a != tok-b"),
        ("shards", "data-b", "data-a != data-b"),
        ("stream", {"seed": 1}, "seed: 0 != 1"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path, part: str, value: Any, named: str) -> None:
    trainee = Trainee(tmp_path)
    trainee.save(1)
    with pytest.raises(DataError, match=named) as caught:
        trainee.restore(IDENTITY | {part: value})
    assert part in caught.value.value


def test_a_failed_write_is_a_resource_error_and_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainee = Trainee(tmp_path)
    trainee.save(1)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("torch.distributed.checkpoint.filesystem._write_item", full)
        with pytest.raises(ResourceError, match="No space left on device"):
            trainee.save(2)
    assert files.newest_complete(tmp_path) == tmp_path / "step-000000001"
    state = Trainee(tmp_path).restore()
    assert state is not None
    assert state["step"] == 1
    trainee.save(2)
    assert [files.step_of(path) for path in files.complete_checkpoints(tmp_path)] == [2, 1]


def test_weights_are_read_without_a_process_group(tmp_path: Path) -> None:
    trainee = Trainee(tmp_path)
    trainee.train(2)
    weights = load_weights(trainee.save(2))
    expected = trainee.model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return Path.touch, (Path(tmp_path / "owned"),)  # pyright: ignore[reportReturnType]

    path = Trainee(tmp_path / "checkpoints").save(1)
    (path / ".metadata").write_bytes(pickle.dumps(Attack()))
    marker = json.loads((path / "COMPLETE").read_text())["files"]
    files.mark_complete(path, marker | files.digests([path / ".metadata"]))
    assert files.damage(path) == "", "the attacker has fixed the digests"
    with pytest.raises(DataError, match="no place"):
        load_weights(path)
    with pytest.raises(DataError, match="no place"):
        Trainee(tmp_path / "checkpoints").restore()
    assert not (tmp_path / "owned").exists()


def test_only_tensors_are_stored(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from trainers.checkpoint import _Reader

    path = Trainee(tmp_path).save(1)
    entries = _Reader(path).read_metadata().state_dict_metadata
    assert all(isinstance(entry, TensorStorageMetadata) for entry in entries.values())
    assert {"model.0.weight", "optimizer.state.0.weight.exp_avg", "optimizer.state.1.weight.step"} <= entries.keys()
