"""``sundog demo``: every stage in turn on real text, one line each, ending with a served model that answers.

Each stage is the stage that its own command runs; a stage that is complete is not repeated.
"""

import json
import socket
import sys
import time
import urllib.request
from pathlib import Path

from cluster.connection import connect
from cluster.serving import serving
from conf.errors import EXIT_DONE, EXIT_STOPPED
from conf.schema import RunConfig
from conf.serving import ServeConfig
from launch.progress import format_seconds
from launch.serve import APP
from launch.stages import describe, run_stage
from launch.train import stopped_line, train
from trainers.export import export
from trainers.report import write_report

PROMPT = "def "
STEPS = 7
REQUEST_TIMEOUT_SEC = 60.0


def _say(number: int, name: str, text: str, seconds: float) -> None:
    print(f"[{number}/{STEPS}] {name:<7} {text}  [{format_seconds(seconds)}]", flush=True)


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def ask(url: str, settings: ServeConfig) -> str:
    """Return the served model's continuation of the prompt."""
    body = {"model": settings.model_name, "prompt": PROMPT, "max_tokens": 32, "temperature": 0.7, "seed": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_SEC) as response:
        return json.load(response)["choices"][0]["text"]


def first_loss(run_dir: Path) -> float:
    """Return the loss of the run's first recorded step."""
    with (run_dir / "metrics.jsonl").open() as lines:
        return json.loads(next(lines))["train/loss"]


def main(name: str, config: RunConfig) -> int:
    begin = time.monotonic()
    with connect(config.cluster) as connection:
        print(f"Ray is up  [{format_seconds(time.monotonic() - begin)}]", flush=True)
        for number, stage in enumerate(("curate", "order", "pack"), 1):
            manifest, seconds = run_stage(stage, config)
            _say(number, stage, describe(stage, manifest) + (" (already done)" if manifest.reused else ""), seconds)
        start = time.monotonic()
        result = train(config)
        run_dir = Path(config.run_dir)
        if result["status"] == "stopped":
            print(stopped_line(result))
            return EXIT_STOPPED
        fall = f"loss {first_loss(run_dir):.2f} -> {result['loss']:.2f}"
        text = f"{config.cluster.ranks} ranks, {config.sequence.strategy}, {result['step']} steps, {fall}"
        _say(4, "train", text, time.monotonic() - start)
        start = time.monotonic()
        folder = export(config)
        _say(5, "export", f"{folder} (safetensors, config, tokenizer)", time.monotonic() - start)
        start = time.monotonic()
        config.serve.port = _free_port(config.serve.host)
        with serving(config.serve, APP, cluster_ends=connection.local) as url:
            answer = ask(url, config.serve)
            _say(6, "serve", f"{url}/v1 answered {PROMPT + answer!r}", time.monotonic() - start)
    start = time.monotonic()
    page = write_report(run_dir)
    _say(7, "report", str(page), time.monotonic() - start)
    print(f"run folder: {run_dir}   all of it: {format_seconds(time.monotonic() - begin)}")
    program = sys.argv[0] if sys.argv[0].endswith("sundog") else "sundog"
    print(f"go on: {program} generate generate.model={folder} --prompt '{PROMPT}'")
    print(f"       {program} serve serve.model={folder}")
    return EXIT_DONE
