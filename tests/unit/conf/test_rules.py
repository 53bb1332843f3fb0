"""Rules over several fields: mesh sizes, layouts, batches, and that every shipped YAML composes."""

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import ConfigError
from conf.images import check_image_training
from conf.rules import check, flat_keys, lookup, mesh_sizes
from conf.schema import CHOICES, RunConfig


def config(**values: object) -> RunConfig:
    made = RunConfig()
    for key, value in values.items():
        *path, leaf = key.split("__")
        node: object = made
        for part in path:
            node = getattr(node, part)
        assert hasattr(node, leaf)
        setattr(node, leaf, value)
    return made


@given(
    ranks=st.integers(1, 24),
    kind=st.sampled_from(["ddp", "fsdp"]),
    strategy=st.sampled_from(["local", "ring", "token_ring"]),
    replicate=st.integers(0, 4),
    shard=st.integers(0, 4),
    degree=st.integers(0, 6),
)
@settings(max_examples=300, deadline=None)
def test_mesh_uses_every_rank_and_keeps_explicit_sizes(
    ranks: int, kind: str, strategy: str, replicate: int, shard: int, degree: int
) -> None:
    made = config(
        cluster__ranks=ranks,
        sharding__kind=kind,
        sequence__strategy=strategy,
        sharding__dp_replicate=replicate,
        sharding__dp_shard=shard,
        sequence__degree=degree,
    )
    products = [
        r * s * c
        for r in ([replicate] if replicate else range(1, ranks + 1) if kind == "ddp" else [1])
        for s in ([shard] if shard else range(1, ranks + 1))
        for c in ([degree] if degree else range(1, ranks + 1))
        if (r == 1 if kind == "fsdp" else s == 1) and (strategy != "local" or c == 1)
    ]
    if ranks not in products:
        with pytest.raises(ConfigError) as raised:
            mesh_sizes(made)
        assert raised.value.field in ("cluster.ranks", "sequence.degree", "sharding.dp_shard", "sharding.dp_replicate")
        return
    mesh = mesh_sizes(made)
    assert mesh.ranks == ranks
    assert mesh.dp * mesh.cp == ranks
    assert replicate in (0, mesh.dp_replicate)
    assert shard in (0, mesh.dp_shard)
    assert degree in (0, mesh.cp)
    assert strategy != "local" or mesh.cp == 1
    assert kind != "ddp" or mesh.dp_shard == 1


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("hsdp", {}, (2, 1, 4)),
        ("hsdp", {"sequence__degree": 2}, (2, 2, 2)),
        ("hsdp", {"sequence__degree": 1, "sharding__dp_replicate": 4}, (4, 2, 1)),
        ("hsdp", {"sequence__degree": 1, "sharding__dp_shard": 2}, (4, 2, 1)),
        ("zero1", {"sequence__degree": 2}, (1, 4, 2)),
        ("zero3", {}, (1, 1, 8)),
    ],
)
def test_meshes_of_eight_ranks(kind: str, changes: dict[str, Any], expected: tuple[int, int, int]) -> None:
    mesh = mesh_sizes(config(cluster__ranks=8, sharding__kind=kind, **changes))
    assert (mesh.dp_replicate, mesh.dp_shard, mesh.cp) == expected


def test_default_mesh_gives_all_ranks_to_the_sequence() -> None:
    assert mesh_sizes(config(cluster__ranks=4)).cp == 4
    fsdp = mesh_sizes(config(cluster__ranks=8, sharding__kind="fsdp", sequence__degree=2))
    assert (fsdp.dp_replicate, fsdp.dp_shard, fsdp.cp) == (1, 4, 2)
    ddp = mesh_sizes(config(cluster__ranks=8, sequence__degree=2))
    assert (ddp.dp_replicate, ddp.dp_shard, ddp.cp) == (4, 1, 2)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"data__context": 510, "cluster__ranks": 2}, "data.context"),
        ({"cluster__ranks": 3, "sequence__degree": 2}, "sequence.degree"),
        ({"sequence__strategy": "local", "sequence__degree": 2}, "sequence.degree"),
        ({"model__kv_heads": 3}, "model.kv_heads"),
        ({"model__dim": 250}, "model.heads"),
        ({"model__head_dim": 33}, "model.head_dim"),
        ({"model__depth": 1.5}, "model.depth"),
        ({"model__depth": 0.5, "cluster__ranks": 2}, "model.depth"),
        ({"model__modalities": ["text", "image"]}, "model.modality_tokens"),
        ({"model__modalities": []}, "model.modality_tokens"),
        ({"model__experts__groups": [4, 4]}, "model.experts.groups"),
        ({"model__experts__groups": [0]}, "model.experts.groups"),
        ({"model__experts__groups": [8], "model__experts__active": 9.0}, "model.experts.active"),
        (
            {
                "model__experts__groups": [8],
                "model__experts__active": 1.5,
                "model__experts__routing": "token_choice",
            },
            "model.experts.routing",
        ),
        ({"model__experts__groups": [8], "model__experts__pool_windows": 3}, "model.experts.pool_windows"),
        (
            {"model__experts__groups": [4], "sharding__expert_degree": 2, "cluster__ranks": 2},
            "sharding.expert_degree",
        ),
        (
            {
                "model__experts__groups": [3],
                "sharding__kind": "fsdp",
                "sharding__expert_degree": 2,
                "cluster__ranks": 2,
            },
            "sharding.expert_degree",
        ),
        ({"sharding__kind": "fsdp", "sharding__expert_degree": 2, "cluster__ranks": 2}, "sharding.expert_degree"),
        (
            {
                "model__experts__groups": [6],
                "sharding__kind": "fsdp",
                "sharding__expert_degree": 3,
                "sequence__degree": 2,
                "cluster__ranks": 6,
            },
            "sharding.expert_degree",
        ),
        ({"trainer__batch": 9, "sequence__degree": 1, "cluster__ranks": 2}, "trainer.batch"),
        ({"sharding__kind": "fsdp", "sharding__dp_replicate": 2, "cluster__ranks": 2}, "sharding.dp_replicate"),
        ({"sharding__kind": "hsdp", "sharding__dp_replicate": 1, "cluster__ranks": 2}, "sharding.dp_replicate"),
        ({"sharding__kind": "hsdp", "cluster__ranks": 1}, "cluster.ranks"),
        ({"sharding__kind": "fsdp", "sharding__offload": "all"}, "sharding.offload"),
        ({"sharding__kind": "ddp", "sharding__offload": "optimizer"}, "sharding.offload"),
        ({"sharding__kind": "zero2", "sharding__offload": "all"}, "sharding.offload"),
        ({"sharding__kind": "zero3", "model__experts__groups": [4]}, "sharding.kind"),
        (
            {"sharding__kind": "zero1", "trainer__objective": "routers", "trainer__init_from": "x"},
            "trainer.objective",
        ),
        ({"trainer__batch": 9, "trainer__micro_batch": 2}, "trainer.micro_batch"),
        ({"trainer__warmup_steps": 1000}, "trainer.warmup_steps"),
        ({"trainer__lr": 0.0}, "trainer.lr"),
        ({"trainer__lr": float("nan")}, "trainer.lr"),
        ({"trainer__beta1": 1.5}, "trainer.beta1"),
        ({"data__source": "path"}, "data.path"),
        ({"data__path": "x"}, "data.path"),
        ({"data__vocab_size": 100}, "data.vocab_size"),
        ({"data__attention": "docs"}, "data.attention"),
        ({"serve__port": 70000}, "serve.port"),
        ({"name": ""}, "name"),
        ({"run_dir": "a", "data__dir": "a"}, "run_dir"),
    ],
)
def test_impossible_combination_names_its_field(values: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check(config(**values))
    error = raised.value
    assert error.field == field
    assert error.rule
    assert error.fix
    assert error.exit_code == 2


def test_defaults_are_legal_and_every_choice_exists() -> None:
    made = check(RunConfig())
    assert set(CHOICES) <= set(flat_keys(made))
    for key, legal in CHOICES.items():
        assert lookup(made, key) in legal


def test_every_choice_is_reached_by_the_check() -> None:
    for key, bad in itertools.product(CHOICES, ["", "no-such"]):
        made = RunConfig()
        section, _, leaf = key.rpartition(".")
        setattr(lookup(made, section), leaf, bad)
        with pytest.raises(ConfigError) as raised:
            check(made)
        assert raised.value.field == key


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"image_tokenizer__patch": 3}, "image_tokenizer.patch"),
        ({"image_tokenizer__size": 30}, "image_tokenizer.patch"),
        ({"image_tokenizer__channels": 2}, "image_tokenizer.channels"),
        ({"image_tokenizer__codes": 0}, "image_tokenizer.codes"),
        ({"image_tokenizer__held_out": 1.0}, "image_tokenizer.held_out"),
        ({"data__source": "digit_docs"}, "data.image_tokenizer"),
        ({"data__image_field": "images"}, "data.image_tokenizer"),
        ({"data__source": "digit_docs", "data__path": "x", "data__image_tokenizer": "x"}, "data.path"),
    ],
)
def test_image_settings_that_do_not_fit_are_named(changes: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check(config(**changes))
    assert raised.value.field == field


@pytest.mark.parametrize(
    ("changes", "field"),
    [({}, "data.image_tokenizer"), ({"data__image_tokenizer": "x", "cluster__ranks": 3}, "trainer.batch")],
)
def test_training_an_image_tokenizer_needs_images_and_an_even_batch(changes: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check_image_training(config(**changes))
    assert raised.value.field == field
