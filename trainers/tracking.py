"""Where metrics go: metrics.jsonl always, Weights & Biases when asked for. Rank 0 only.

A tracker never ends training. One that is asked for and not installed is a config error before anything starts; one
that fails later (no network, no account, a full disk) is reported as a log event, once, and is left out from then on,
since metrics.jsonl has every number and training time is worth more than a dashboard.
"""

import importlib.util
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from conf.errors import ConfigError
from conf.schema import RunConfig
from data.files import read_json, write_atomic
from trainers.journal import METRICS_FILE, SAMPLES_FILE, Journal
from trainers.metrics import checked
from trainers.wandb_run import WandbRun, record_evaluation

ID_FILE = "tracker.json"
Log = Callable[[str], None]


def require_tracker(config: RunConfig) -> None:
    """Check, before anything starts, that the tracker that ``config`` asks for is installed.

    Raises:
        ConfigError: it is not.
    """
    if config.tracker.wandb != "disabled" and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "tracker.wandb",
            config.tracker.wandb,
            "wandb is not installed",
            "pip install 'sundog[wandb]', or tracker=files",
        )


def run_id(run_dir: Path, known: str = "") -> str:
    """Return the run's tracker id: ``known`` (from a checkpoint), else the one kept in the run folder, else a new one.

    The id is kept in the folder too, so that a run killed before its first checkpoint goes on under the same id.
    """
    file = run_dir / ID_FILE
    if not known and file.exists():
        known = str(read_json(file).get("id", ""))
    known = known or secrets.token_hex(4)
    write_atomic(file, f'{{"id": "{known}"}}\n')
    return known


def log_evaluation(config: RunConfig, values: Mapping[str, float], log: Log) -> None:
    """Write an evaluation's figures to the summary of the run in wandb, where ``config`` asks for it."""
    if config.tracker.wandb == "disabled":
        return
    require_tracker(config)
    try:
        record_evaluation(config, run_id(Path(config.run_dir)), values)
    except Exception as error:  # as in ``Tracker``: the figures are in the JSON file
        log(f"WARNING: wandb failed: {type(error).__name__}: {' '.join(str(error).split())}")


class Tracker:
    """Writes a run's metrics and samples. ``resume_step`` optimizer steps are done already."""

    def __init__(self, config: RunConfig, identifier: str, resume_step: int, world_size: int, log: Log) -> None:
        self._say = log
        run_dir = Path(config.run_dir)
        self._metrics = Journal(run_dir / METRICS_FILE, resume_step)
        self._samples = Journal(run_dir / SAMPLES_FILE, resume_step)
        self._wandb: WandbRun | None = None
        if config.tracker.wandb != "disabled":
            self._guarded("start", lambda: self._start_wandb(config, identifier, world_size))

    def _start_wandb(self, config: RunConfig, identifier: str, world_size: int) -> None:
        self._wandb = WandbRun(config, identifier, world_size)
        self._say(f"wandb run {identifier}: {self._wandb.where}")

    def _guarded(self, what: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # a tracker may fail in any way, and must not take the training along
            self._wandb = None
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            self._say(f"WARNING: wandb failed ({what}) and is off from here on; metrics.jsonl goes on. {reason}")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the metrics of ``step`` (optimizer steps done): exactly once a step."""
        record = checked(values)
        self._metrics.write(step, record)
        if (wandb := self._wandb) is not None:
            self._guarded("log", lambda: wandb.log(step, record))

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Record a table of continuations: each row has ``prompt`` and ``continuation``."""
        self._samples.write(step, {"rows": rows})
        if (wandb := self._wandb) is not None:
            self._guarded("samples", lambda: wandb.samples(step, rows))

    def checkpoint(self, step: int, path: Path) -> None:
        """Record a complete checkpoint."""
        if (wandb := self._wandb) is not None:
            self._guarded("checkpoint", lambda: wandb.checkpoint(step, path))

    def sync(self) -> None:
        """Make the records durable."""
        self._metrics.sync()
        self._samples.sync()

    def close(self, finished: bool) -> None:
        """End the records; ``finished`` says whether the run reached its last step or a clean stop."""
        self._metrics.close()
        self._samples.close()
        if (wandb := self._wandb) is not None:
            self._guarded("pictures", wandb.pictures)
            self._guarded("finish", lambda: wandb.finish(0 if finished else 1))
