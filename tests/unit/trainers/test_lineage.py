from dataclasses import asdict

import pytest

from conf.schema import RunConfig
from trainers import lineage
from trainers.state import StateWriter, TrainState, identity


def test_changed_keys_names_leaves() -> None:
    old = {"trainer": {"lr": 1, "steps": 5}, "name": "a", "gone": 1}
    new = {"trainer": {"lr": 2, "steps": 5}, "name": "a"}
    assert lineage.changed_keys(old, new) == ["gone 1 -> None", "trainer.lr 1 -> 2"]


def test_digest_depends_on_every_value() -> None:
    config, other = RunConfig(), RunConfig()
    assert lineage.config_digest(config) == lineage.config_digest(other)
    other.trainer.clip = 0.5
    assert lineage.config_digest(config) != lineage.config_digest(other)


def test_revision_from_the_environment_or_git(monkeypatch: pytest.MonkeyPatch) -> None:
    lineage.git_revision.cache_clear()
    monkeypatch.setenv(lineage.REVISION_VARIABLE, "abc123")
    assert lineage.git_revision() == "abc123"
    lineage.git_revision.cache_clear()
    monkeypatch.delenv(lineage.REVISION_VARIABLE)
    assert lineage.git_revision()
    lineage.git_revision.cache_clear()


def test_state_survives_the_round_trip(tmp_path: object) -> None:
    config = RunConfig(seed=7)
    config.data.dir = str(tmp_path)
    writer = StateWriter(config, identity(config, {"dim": 8}, "tok", "shards"), world_size=2)
    state = TrainState(run_id="abcd")
    state.advance(100, 2.5)
    state.advance(100, 2.0)
    stored = writer.to_json(state)
    assert TrainState.from_json(stored) == TrainState(step=2, tokens=200, loss=2.0, run_id="abcd")
    assert stored["identity"]["stream"]["seed"] == stored["seed"] == 7
    assert stored["config"]["trainer"]["steps"] == config.trainer.steps
    assert stored["config_digest"] == lineage.config_digest(config)


def test_a_resumed_run_tells_of_no_change_that_training_does_not_see() -> None:
    before, after = RunConfig(), RunConfig()
    after.curation.min_chars += 1
    after.order.neighbours += 1
    after.data.shard_documents += 1
    after.serve.port += 1
    after.sweep.parallel += 1
    after.rephrase.model = "other"
    assert lineage.training_part(asdict(before)) == lineage.training_part(asdict(after))
    after.trainer.lr, after.data.eval_fraction, after.cluster.ranks = 0.5, 0.5, 4
    changes = lineage.changed_keys(lineage.training_part(asdict(before)), lineage.training_part(asdict(after)))
    assert [change.split()[0] for change in changes] == ["cluster.ranks", "data.eval_fraction", "trainer.lr"]


def test_every_part_that_training_sees_is_a_part_of_the_config() -> None:
    whole = asdict(RunConfig())
    assert set(lineage.PARTS) <= whole.keys()
    assert set(lineage.DATA_PARTS) <= whole["data"].keys()
