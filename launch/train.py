"""``sundog train``: supervise a gang of ranks from the newest checkpoint to the last step."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.connection import connect
from cluster.supervisor import supervise
from conf.errors import EXIT_BUG, EXIT_DONE, EXIT_STOPPED, ConfigError, DataError, SundogError
from conf.images import IMAGES, check_image_training
from conf.schema import RunConfig
from data.files import exclusive, write_atomic
from data.manifest import read_manifest
from data.shards import open_shards
from data.stages import stage_folders
from launch.plan import describe_mesh, describe_model
from launch.preflight import dump
from launch.signals import stop_requests
from trainers.console import show

RANK_FUNCTION, IMAGES_FUNCTION = "trainers.pretrain:run", "trainers.image_tokenizer:run"


def prepare(config: RunConfig) -> None:
    """Write the config into the run folder and say what is about to start; fail early when the data is not there."""
    run_dir, folders = Path(config.run_dir), stage_folders(config)
    if config.trainer.objective == IMAGES:
        check_image_training(config)
        documents = read_manifest(folders.curated, command="curate").figures["kept"]
        lines = [f"data   images of {documents:,} documents from {folders.curated}"]
    else:
        shards = open_shards(folders.packed)
        lines = [
            f"model  {describe_model(config, shards.vocab_size)}",
            f"mesh   {describe_mesh(config)}",
            f"data   {len(shards):,} windows of {shards.context} tokens from {folders.packed}",
        ]
    write_atomic(run_dir / "config.yaml", dump(config))
    print("\n".join(lines))
    print(f"run    {run_dir}", flush=True)


def write_status(config: RunConfig, state: str, **facts: Any) -> None:
    """Record the state of the run where other programs can read it."""
    status = {"state": state, "pid": os.getpid(), "host": socket.gethostname(), "time": time.time(), **facts}
    write_atomic(Path(config.run_dir) / "status.json", json.dumps(status))


def train(config: RunConfig) -> dict[str, Any]:
    """Train to the last step or to a stop request; return what rank 0 returned.

    Raises:
        SundogError: what a rank or the cluster raised, after ``status.json`` has recorded it.
    """
    rule, fix = "one command at a time may write a run folder", "wait for it, or choose another name="
    with exclusive(config.run_dir, rule, fix), stop_requests() as stops, refused_leaves_no_trace(Path(config.run_dir)):
        prepare(config)
        write_status(config, "running")
        function = IMAGES_FUNCTION if config.trainer.objective == IMAGES else RANK_FUNCTION
        try:
            with connect(config.cluster):
                result = supervise(config, function, on_event=show, stop=lambda: len(stops))
        except BaseException as error:
            code = error.exit_code if isinstance(error, SundogError) else EXIT_BUG
            write_status(config, "failed", exit_code=code, error=str(error))
            raise
        code = EXIT_STOPPED if result["status"] == "stopped" else EXIT_DONE
        write_status(config, result["status"], exit_code=code, step=result["step"])
        return result


@contextmanager
def refused_leaves_no_trace(run_dir: Path) -> Iterator[None]:
    """Put back what the folder said of its run when the command was refused (a checkpoint of another model, say)."""
    names = ("config.yaml", "lineage.json", "status.json")
    before = {run_dir / name: (run_dir / name).read_bytes() for name in names if (run_dir / name).exists()}
    try:
        yield
    except (ConfigError, DataError):
        for path, content in before.items():
            write_atomic(path, content)
        raise


def stopped_line(result: dict[str, Any]) -> str:
    """Return what a person is told about a run that was asked to stop."""
    where = f"at step {result['step']}, checkpoint written" if result["step"] else "before the first step"
    return f"stopped {where}; the same command goes on from there"


def main(name: str, config: RunConfig) -> int:
    result = train(config)
    if result["status"] == "stopped":
        print(stopped_line(result))
        return EXIT_STOPPED
    print(f"done: step {result['step']}, loss {result['loss']:.3f}; plots: sundog report {config.run_dir}")
    return EXIT_DONE
