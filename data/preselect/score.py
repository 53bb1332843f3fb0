"""``sundog score``: a sample, the ladder's losses on it, and the predictive strength of every document.

Three stages below ``preselect.dir``: ``sample``, ``losses`` (one file a model and part) and ``strength``. The first two
are expensive and keyed by what decides them; the last is a view over losses, made again whenever abilities, weights,
ties or margins change.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from conf.errors import DataError
from conf.schema import RunConfig
from data.documents import parquet_writer, read_columns
from data.ingest import ingest
from data.manifest import Manifest
from data.preselect.controls import permuted, reliability
from data.preselect.exercises import CHOICES
from data.preselect.ladder import Rung, model_digest, read_ladder
from data.preselect.pairs import positives_and_negatives
from data.preselect.sample import ITEMS, sample
from data.preselect.strength import Array, Rule, pair_agreement, strength
from data.stages import RunUnits, Stage, collect_files, record_files, run_stage, stage_folders

STRENGTH = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("domain", pa.string()),
        ("chars", pa.int64()),
        ("losses", pa.list_(pa.float64())),  # bits a character, one a model of the ladder
        ("strength", pa.float64()),
        ("label", pa.int8()),  # 1: positive, 0: negative, null: neither
    ]
)
STRENGTH_FILE = "strength.parquet"


def folder_of(config: RunConfig, stage: str) -> Path:
    """The folder of one of PreSelect's stages."""
    return Path(config.preselect.dir).expanduser().absolute() / stage


def score(config: RunConfig, run_units: RunUnits) -> Manifest:
    """Scores a sample of the corpus by the ladder; returns the manifest of ``{preselect.dir}/strength``.

    Figures: ``models`` (with ability, its error and source, mean loss), ``failed`` (models that did not load),
    ``documents``, ``no_strength`` (documents with a loss that is not finite), ``positives``, ``negatives``, ``pairs``,
    ``reliability``, ``controls``, ``domains``. Raises DataError for a ladder, a model (with ``preselect.strict``) or a
    sample that cannot be used.
    """
    rungs = read_ladder(config.preselect.ladder)
    corpus = ingest(config, run_units)
    drawn = sample(config, corpus, stage_folders(config).documents, run_units)
    return strengths(config, rungs, drawn, losses(config, rungs, drawn, run_units))


def losses(config: RunConfig, rungs: list[Rung], drawn: Manifest, run_units: RunUnits) -> Manifest:
    """The losses of every model that loads on every part of the sample and on the evaluation's items."""
    settings = {name: getattr(config.preselect, name) for name in ("window", "stride", "row_tokens")}
    digests, missing = _digests(rungs)
    folder = folder_of(config, "losses")
    inputs = {"models": digests, "missing": sorted(missing)}
    stage = Stage("preselect_losses", 1, folder, settings, drawn, inputs, config.data.overwrite, keyed=True)

    def body(stage: Stage) -> tuple[dict[str, Any], dict[str, Any]]:
        present = [rung for rung in rungs if rung.name in digests]
        asked = [{"model": rung.folder, "digest": digests[rung.name], "name": rung.name} for rung in present]
        found = run_units("score: load models", "inference.losses:inspect_unit", asked)
        failed = missing | {r.name: info["failed"] for r, info in zip(present, found, strict=True) if info["failed"]}
        loaded = {r.name: info for r, info in zip(present, found, strict=True) if not info["failed"]}
        if failed and (config.preselect.strict or len(loaded) < 2):
            rule = "every model of the ladder loads" if config.preselect.strict else "two models of the ladder load"
            value = "; ".join(f"{name}: {reason.splitlines()[0]}" for name, reason in failed.items())
            raise DataError("preselect.ladder", value, rule, "repair these models, or take them out of the ladder")
        least = min(info["context"] for info in loaded.values())
        if (window := settings["window"] or least) > least:
            rule = f"a window is no longer than the smallest context of the ladder, {least}"
            raise DataError("preselect.window", window, rule, "preselect.window=0, or a ladder of longer contexts")
        read = {"window": window, "stride": settings["stride"] or max(1, window // 2)}
        work, keys = _loss_work(config, [u for u in asked if u["name"] in loaded], drawn, read)
        results = run_units("score: losses", "inference.losses:losses_unit", stage.units("losses", work, keys))
        files = {name: [u["file"] for u in work if u["name"] == name] for name in loaded}
        return {"models": loaded, "files": files, "failed": failed, **read}, collect_files(results)

    return run_stage(stage, body)


def _digests(rungs: list[Rung]) -> tuple[dict[str, str], dict[str, str]]:
    """Digests of the models that are there, and what is wrong with the others."""
    digests: dict[str, str] = {}
    missing: dict[str, str] = {}
    for rung in rungs:
        try:
            digests[rung.name] = model_digest(rung.folder)
        except DataError as error:
            missing[rung.name] = str(error)
    return digests, missing


def _loss_work(
    config: RunConfig, models: list[dict[str, Any]], drawn: Manifest, read: dict[str, int]
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Units (model, part), one model's units together, and what decides each."""
    parts = [ITEMS, *(part["file"] for part in drawn.figures["parts"])]
    shared = {**read, "row_tokens": config.preselect.row_tokens, "sample": str(folder_of(config, "sample"))}
    shared["cache"] = str(Path(config.preselect.cache).expanduser().absolute())
    work: list[dict[str, Any]] = []
    keys: list[Any] = []
    for model in models:
        for part in parts:
            work.append({**shared, **model, "part": part, "file": f"{model['digest'][:16]}/{part}"})
            keys.append([model["digest"], read, drawn.files[part]["sha256"]])
    return work, keys


def strengths(config: RunConfig, rungs: list[Rung], drawn: Manifest, lost: Manifest) -> Manifest:
    """The strength stage: a view over losses, always made anew where its settings changed."""
    wanted = config.preselect
    rungs = [rung for rung in rungs if rung.name in lost.figures["models"]]
    names = ("ties", "margin", "normalise", "positive", "most")
    settings = {name: getattr(wanted, name) for name in names} | {"seed": config.seed}
    inputs = [[rung.name, rung.scores, rung.weight] for rung in rungs]
    stage = Stage("preselect_strength", 1, folder_of(config, "strength"), settings, lost, inputs, overwrite=True)

    def body(stage: Stage) -> tuple[dict[str, Any], dict[str, Any]]:
        parts = [part["file"] for part in drawn.figures["parts"]]
        rows = [read_columns(folder_of(config, "sample") / part, ["id", "source", "domain", "text"]) for part in parts]
        chars = np.array([len(t) for table in rows for t in table["text"].to_pylist()], dtype=np.float64)
        table = pa.concat_tables([part.drop_columns("text") for part in rows])
        domains = np.array(table["domain"].to_pylist(), dtype=object)
        sums = _read_losses(config, lost, rungs, parts)
        bits, errors, halves = _per_character(sums, chars)
        abilities, models = _abilities(config, rungs, lost)
        weights = np.array([rung.weight for rung in rungs])
        rule = Rule(wanted.ties, wanted.margin, wanted.normalise)
        found = strength(bits, abilities, rule, errors=errors, weights=weights, domains=domains)
        positives, negatives = positives_and_negatives(found, wanted.positive, wanted.most, config.seed)
        labels = np.full(len(found), -1, dtype=np.int8)
        labels[positives], labels[negatives] = 1, 0
        _write(stage.folder / STRENGTH_FILE, table, chars, bits, found, labels)
        parts_of = tuple(strength(half, abilities, Rule(wanted.ties), weights=weights) for half in halves)
        finite = np.isfinite(bits).all(axis=0)
        figures = {
            "models": [
                {**model, **lost.figures["models"][model["name"]], "mean_loss": _number(bits[row][finite].mean())}
                for row, model in enumerate(models)
            ],
            "failed": lost.figures["failed"],
            "documents": len(found),
            "no_strength": int(np.isnan(found).sum()),
            "positives": len(positives),
            "negatives": len(negatives),
            "pairs": [{k: _number(v) for k, v in pair.items()} for pair in pair_agreement(bits, abilities)],
            "reliability": {k: _number(v) for k, v in reliability((parts_of[0], parts_of[1])).items()},
            "controls": _plain(permuted(bits, abilities, halves, domains, config.seed)),
            "domains": _by_domain(found, labels, domains),
            "window": lost.figures["window"],
            "stride": lost.figures["stride"],
        }
        return figures, record_files(stage.folder, [STRENGTH_FILE])

    return run_stage(stage, body)


def _read_losses(config: RunConfig, lost: Manifest, rungs: list[Rung], parts: list[str]) -> dict[str, Array]:
    """Columns of the losses, [models, documents] each; ``parts`` names the parts of the sample."""
    names = ["bits", "even_bits", "square_bits", "tokens", "even_tokens"]
    folder = folder_of(config, "losses")
    columns: dict[str, list[Array]] = {name: [] for name in names}
    for rung in rungs:
        files = [file for file in lost.figures["files"][rung.name] if Path(file).name in parts]
        table = pa.concat_tables([read_columns(folder / file, names) for file in files])
        for name in names:
            columns[name].append(table[name].to_numpy().astype(np.float64))
    return {name: np.array(found) for name, found in columns.items()}


def _per_character(sums: dict[str, Array], chars: Array) -> tuple[Array, Array, tuple[Array, Array]]:
    """Losses in bits a character, their standard errors, and the losses of both halves of the tokens."""
    bits, tokens, even = sums["bits"], sums["tokens"], sums["even_tokens"]
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = np.maximum(sums["square_bits"] / tokens - (bits / tokens) ** 2, 0.0)
        errors = np.sqrt(tokens * variance * tokens / np.maximum(tokens - 1, 1)) / chars
        first = sums["even_bits"] / even
        second = (bits - sums["even_bits"]) / (tokens - even)
        return bits / chars, errors, (first, second)


def _abilities(config: RunConfig, rungs: list[Rung], lost: Manifest) -> tuple[Array, list[dict[str, Any]]]:
    """Ability of each model: the table's where it has all, else the accuracy on the built-in items."""
    given = [rung.ability for rung in rungs]
    if any(a is None for a in given) and any(a is not None for a in given):
        without = ", ".join(rung.name for rung in rungs if rung.ability is None)
        rule = "either every model of a ladder has an ability in the table, or none"
        raise DataError("preselect.ladder", f"no ability: {without}", rule, "add theirs, or take the others out")
    items = _read_losses(config, lost, rungs, [ITEMS])["bits"].reshape(len(rungs), -1, CHOICES)
    right = items[:, :, 0] < items[:, :, 1:].min(axis=2)
    accuracy = right.mean(axis=1)
    error = np.sqrt(accuracy * (1 - accuracy) / right.shape[1])
    abilities = np.array([a for a in given if a is not None]) if given[0] is not None else accuracy
    source = "table" if given[0] is not None else "built-in evaluation"
    models = [
        {
            "name": rung.name,
            "ability": float(abilities[row]),
            "source": source,
            "scores": rung.scores,
            "weight": rung.weight,
            "accuracy": float(accuracy[row]),
            "accuracy_error": float(error[row]),
        }
        for row, rung in enumerate(rungs)
    ]
    return abilities, models


def _write(path: Path, table: pa.Table, chars: Array, bits: Array, found: Array, labels: Any) -> None:
    columns = [*(table[name] for name in ("id", "source", "domain")), pa.array(chars.astype(np.int64))]
    columns += [pa.array(list(bits.T)), pa.array(found), pa.array(labels, mask=labels < 0)]
    with parquet_writer(path, STRENGTH) as writer:
        writer.write_table(pa.table(columns, names=STRENGTH.names).cast(STRENGTH))


def _by_domain(found: Array, labels: Any, domains: Any) -> dict[str, dict[str, Any]]:
    """Documents, mean strength, positives and negatives of each of the hundred largest domains."""
    names, where = np.unique(domains.astype(str), return_inverse=True)
    counts = np.bincount(where)
    rows = {}
    for index in np.argsort(-counts, kind="stable")[:100]:
        mine = where == index
        valid = found[mine & np.isfinite(found)]
        mean = float(valid.mean()) if valid.size else math.nan
        rows[str(names[index])] = {
            "documents": int(counts[index]),
            "mean_strength": _number(mean),
            "positives": int((labels[mine] == 1).sum()),
            "negatives": int((labels[mine] == 0).sum()),
        }
    return rows


def _number(value: Any) -> Any:
    """JSON has no NaN: None stands for it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(tree: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {key: _number(value) for key, value in row.items()} for name, row in tree.items()}
