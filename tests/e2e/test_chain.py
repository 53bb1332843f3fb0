"""The main job, whole: raw text to a served model that answers, each command in a process of its own."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest

from tests.helpers.cli import Done, environment, sundog, write_corpus

SETTINGS = [
    "name=chain",
    "data=path",
    "data.path=corpus",
    "model=tiny",
    "data.context=64",
    "data.vocab_size=400",
    "data.shard_documents=50",
    "trainer.steps=12",
    "trainer.batch=4",
    "trainer.lr=1e-2",
    "trainer.warmup_steps=1",
    "trainer.checkpoint_every=6",
    "trainer.eval_every=6",
    "trainer.eval_windows=2",
    "tracker=wandb_offline",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    write_corpus(folder / "corpus")
    return folder


@pytest.fixture(scope="module")
def demo(place: Path) -> Done:
    """The demo command on this corpus: every stage once, on one Ray cluster."""
    before = {process.pid for process in psutil.process_iter()}
    done = sundog("demo", *SETTINGS, cwd=place, timeout=280)
    assert done.code == 0, done.out + done.err
    left = [p for p in psutil.process_iter(["cmdline"]) if p.pid not in before and str(place) in str(p.info["cmdline"])]
    assert left == []
    return done


def metrics(place: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (place / "runs/chain/metrics.jsonl").read_text().splitlines()]


def test_demo_prints_a_line_per_stage_and_the_loss_falls(demo: Done, place: Path) -> None:
    for number, stage in enumerate(["curate", "order", "pack", "train", "export", "serve", "report"], 1):
        assert f"[{number}/7] {stage}" in demo.out
    losses = [row["train/loss"] for row in metrics(place)]
    assert len(losses) == 12
    assert losses[-1] < 0.8 * losses[0]


def test_run_folder_holds_config_lineage_status_and_report(demo: Done, place: Path) -> None:
    run = place / "runs/chain"
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    lineage = json.loads((run / "lineage.json").read_text())
    ancestors = [stage["fingerprint"] for stage in lineage["packed"]["lineage"]]
    assert lineage["curated"]["fingerprint"] in ancestors
    assert lineage["packed"]["parent"] == lineage["ordered"]["fingerprint"] == ancestors[-1]
    assert (run / "config.yaml").exists()
    assert len(list(run.rglob("*.png"))) >= 2
    assert any("wandb" in str(path) for path in run.rglob("*.wandb"))


@pytest.mark.parametrize("stage", ["curate", "order", "pack"])
def test_finished_stage_is_not_repeated(demo: Done, place: Path, stage: str) -> None:
    done = sundog(stage, *SETTINGS, cwd=place)
    assert done.code == 0
    assert "nothing to do" in done.out


def test_changed_settings_are_refused_with_both_fingerprints(demo: Done, place: Path) -> None:
    done = sundog("curate", *SETTINGS, "curation.min_chars=300", cwd=place)
    assert done.code == 2
    assert "curation" in done.err or "min_chars" in done.err
    assert "overwrite=true" in done.err
    assert "Traceback" not in done.err


def test_generate_continues_a_prompt(demo: Done, place: Path) -> None:
    done = sundog("generate", *SETTINGS, "generate.max_tokens=8", "--prompt", "The moon", cwd=place)
    assert done.code == 0, done.err
    assert done.out.startswith("The moon")
    assert len(done.out.strip()) > len("The moon")


def test_another_model_does_not_take_over_the_run(demo: Done, place: Path) -> None:
    done = sundog("train", *SETTINGS, "model.layers=3", "trainer.steps=14", cwd=place)
    assert done.code == 2, done.out + done.err
    assert "Traceback" not in done.err


@pytest.fixture(scope="module")
def server(demo: Done, place: Path) -> Iterator[str]:
    program = [sys.executable, "-m", "launch", "serve", *SETTINGS, "serve.port=18431"]
    process = subprocess.Popen(
        program, cwd=place, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    watchdog = threading.Timer(150, process.kill)
    watchdog.start()
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith("serving"):
            break
    else:
        pytest.fail("".join(seen))
    yield "http://127.0.0.1:18431"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    watchdog.cancel()


def test_server_speaks_the_openai_api(server: str) -> None:
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=60)
    assert [model.id for model in client.models.list()] == ["chain"]
    whole = client.completions.create(model="chain", prompt="The moon", max_tokens=8, temperature=0)
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 8
    pieces = client.completions.create(model="chain", prompt="The moon", max_tokens=8, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == whole.choices[0].text
    chat = client.chat.completions.create(
        model="chain", messages=[{"role": "user", "content": "bread"}], max_tokens=4, temperature=0
    )
    assert chat.choices[0].message.role == "assistant"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")


def test_second_server_on_the_port_is_refused(server: str, place: Path) -> None:
    done = sundog("serve", *SETTINGS, "serve.port=18431", cwd=place)
    assert done.code == 3
    assert "18431" in done.err
    assert "Traceback" not in done.err
