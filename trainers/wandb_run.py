"""One Weights & Biases run: metrics with goals, tables and pictures, artifacts with lineage. The one file with wandb.

Everything works offline; ``wandb sync FOLDER`` sends it later. Artifacts are references: names, digests and paths of
folders that stay where they are, joined as dataset -> checkpoint -> export (each names what it was made from).
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conf.schema import RunConfig
from data.page import png
from trainers import plots
from trainers.checkpoint_folder import MARKER, read_state
from trainers.journal import METRICS_FILE, read_journal
from trainers.lineage import config_digest, git_revision, stages
from trainers.metrics import METRICS
from trainers.report import TIMELINE_FILE

INIT_TIMEOUT_SEC = 30.0
LOAD = "moe/load_imbalance/"
SUMMARY = {"minimize": "min", "maximize": "max"}  # how wandb takes a goal; units are in the run's config


def _init(settings: RunConfig, **options: Any) -> Any:
    import wandb

    run_dir = Path(settings.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    return wandb.init(
        project=settings.tracker.project,
        entity=settings.tracker.entity or None,
        group=settings.tracker.group or None,
        tags=list(settings.tracker.tags) or None,
        dir=run_dir,
        mode="offline" if settings.tracker.wandb == "offline" else "online",
        settings=wandb.Settings(console="off", silent=True, init_timeout=INIT_TIMEOUT_SEC),
        **options,
    )


class WandbRun:
    """The run of rank 0; every call may fail in any way (``trainers.tracking`` guards them)."""

    def __init__(self, config: RunConfig, identifier: str, world_size: int) -> None:
        facts = {"git_revision": git_revision(), "config_digest": config_digest(config), "world_size": world_size}
        units = {metric.name: asdict(metric) for metric in METRICS}
        self._run_dir, self._stages = Path(config.run_dir), stages(config)
        self._run = _init(
            config, name=config.name, id=identifier, resume="allow", config=asdict(config) | facts | {"metrics": units}
        )
        for metric in METRICS:
            if metric.name.endswith("/"):
                self._run.define_metric(metric.name + "*", step_metric="train/tokens")
            else:
                self._run.define_metric(metric.name, summary=SUMMARY.get(metric.goal, "last"))
        self._dataset = ""
        if self._stages:
            artifact = _dataset(self._stages)
            self._dataset = artifact.name
            _take(self._run, artifact)

    @property
    def where(self) -> str:
        """Where the run can be seen, or how it is sent."""
        if not self._run.offline:
            return str(self._run.url)
        folder = Path(self._run.dir).parent
        return f"{folder}; upload it with: wandb sync {folder}"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table of continuations."""
        self._table("samples", step, ["step", "prompt", "continuation"], [(step, *row.values()) for row in rows])

    def _table(self, name: str, step: int, columns: list[str], rows: Sequence[Sequence[Any]]) -> None:
        import wandb

        if rows:
            self._run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])}, step=step)

    def pictures(self) -> None:
        """The report's pictures and the tables behind them, from the run folder: at the end of a command."""
        import wandb
        from PIL import Image

        records = read_journal(self._run_dir / METRICS_FILE)
        if not records:
            return
        step = records[-1]["step"]
        figures = {name: draw(records) for name, draw in plots.PICTURES.items()}
        timeline = self._run_dir / TIMELINE_FILE
        figures["timeline"] = plots.timeline(json.loads(timeline.read_text()) if timeline.exists() else {})
        counts = self._stages.get("curated", {}).get("figures", {})
        figures["dropped"] = plots.dropped(counts)
        drawn = {name: Image.open(io.BytesIO(png(figure))) for name, figure in figures.items() if figure is not None}
        self._run.log({f"pictures/{name}": wandb.Image(image) for name, image in drawn.items()}, step=step)
        self._table("dropped", step, ["rule", "documents"], list(counts.get("dropped", {}).items()))
        loads = [(r["step"], name.removeprefix(LOAD), r[name]) for r in records for name in r if name.startswith(LOAD)]
        self._table("expert_load", step, ["step", "modality", "busiest over mean"], loads)

    def checkpoint(self, step: int, path: Path) -> None:
        """A complete checkpoint, as a version of the run's model."""
        self._run.log_artifact(_checkpoint(path, self._dataset), aliases=["latest", f"step-{step}"])

    def finish(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)


def _take(run: Any, artifact: Any) -> None:
    """Make an artifact an input of the run: logged, and taken once it is there.

    That is what ``use_artifact`` does with a new artifact; offline it refuses, although the file has a place for it and
    ``wandb sync`` obeys it.
    """
    if run.offline:
        run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
    else:
        run.use_artifact(artifact)


def _reference(name: str, kind: str, folder: Path, metadata: dict[str, Any]) -> Any:
    import wandb

    artifact = wandb.Artifact(name, type=kind, metadata=metadata | {"folder": str(folder.absolute())})
    artifact.add_reference(folder.absolute().as_uri(), checksum=False)
    return artifact


def _dataset(manifests: Mapping[str, Mapping[str, Any]]) -> Any:
    """The packed data: named by its fingerprint, with the manifest of every stage that led to it."""
    import wandb

    last = list(manifests.values())[-1]
    artifact = wandb.Artifact(f"dataset-{last['fingerprint'][:12]}", type="dataset", metadata=dict(manifests))
    with artifact.new_file("lineage.json") as file:
        json.dump(manifests, file, indent=1)
    return artifact


def _checkpoint(path: Path, dataset: str) -> Any:
    state = read_state(path)
    files = json.loads((path / MARKER).read_text())["files"]
    kept = {key: state[key] for key in ("step", "tokens", "loss", "eval_loss", "stages", "config_digest")}
    return _reference(f"checkpoint-{state['run_id']}", "model", path, kept | {"files": files, "made_from": dataset})


def record_evaluation(config: RunConfig, identifier: str, values: Mapping[str, float]) -> None:
    """Write an evaluation's figures to the summary of the run."""
    run = _init(config, name=config.name, id=identifier, resume="allow")
    run.summary.update(dict(values))
    run.finish()


def record_export(config: RunConfig, checkpoint: Path, folder: Path) -> None:
    """A run of its own that used a checkpoint and made a Hugging Face folder; nothing when wandb is disabled."""
    if config.tracker.wandb == "disabled":
        return
    run = _init(config, name=f"{config.name}-export", job_type="export", config={"dtype": config.export.dtype})
    manifests = stages(config)
    source = _checkpoint(checkpoint, _dataset(manifests).name if manifests else "")
    _take(run, source)
    state = read_state(checkpoint)
    facts = {"step": state["step"], "dtype": config.export.dtype, "git_revision": git_revision()}
    facts["made_from"] = source.name
    run.log_artifact(_reference(f"export-{state['run_id']}", "export", folder, facts))
    run.finish()
