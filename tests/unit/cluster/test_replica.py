"""A replica whose model runs over two processes, end to end: HTTP, Ray Serve, gloo."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray._private.state import actors

from cluster.local_head import free_port
from cluster.serving import serving
from conf.serving import EngineConfig, ServeConfig
from inference.engine import Engine
from inference.params import SamplingParams
from launch.serve import APP, FOLLOWER
from tests.unit.inference.builders import make_folder

CPUS = 0.25


@pytest.mark.usefixtures("ray_cluster")
def test_a_replica_of_two_ranks_gives_what_one_process_gives(tmp_path: Path) -> None:
    """A prompt that is long enough to be split, over HTTP, twice; then the second rank dies and is replaced."""
    folder = make_folder(tmp_path / "tiny")
    engine = EngineConfig(page_tokens=8, prefix_cache=False)
    alone, prompt = Engine(folder, engine), "the cat sat on the mat. " * 12
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    expected = "".join(step.text for step in alone.stream(alone.encode(prompt), params))
    config = ServeConfig(str(folder), "tiny", port=free_port(), engine=replace(engine, ranks=2))
    asked = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    with serving(config, APP, follower=FOLLOWER, cpus=CPUS) as url:
        for _ in range(2):
            answer = httpx.post(f"{url}/v1/completions", json=asked, timeout=60)
            assert answer.json()["choices"][0]["text"] == expected
        os.kill(_pid_of_rank_1(), signal.SIGKILL)
        deadline = time.monotonic() + 120
        while not _answers(url, asked, expected):
            assert time.monotonic() < deadline, "no replica took the place of the broken one"
            time.sleep(0.5)


def _answers(url: str, asked: dict[str, Any], expected: str) -> bool:
    answer = httpx.post(f"{url}/v1/completions", json=asked, timeout=60)
    assert answer.status_code in (200, 500, 503), answer.text
    return answer.status_code == 200 and answer.json()["choices"][0]["text"] == expected


def _pid_of_rank_1() -> int:
    """From Ray's own table: its public list of actors asks the dashboard, which tests run without."""
    found = [actor for actor in actors().values() if actor["ActorClassName"] == "Rank" and actor["State"] == "ALIVE"]
    assert len(found) == 1
    return found[0]["Pid"]
