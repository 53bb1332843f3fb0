"""The official client against a real server on a loopback port."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from inference.engine import Engine
from inference.runner import Job
from inference.server import build_app
from tests.helpers.served import Served
from tests.unit.inference.builders import Gate, run

SETTINGS = {"model_name": "tiny", "max_concurrent": 4, "max_queue": 4, "max_body_bytes": 50_000, "max_tokens": 1000}


@pytest.fixture
def served(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setenv("SUNDOG_API_TOKEN", "s3cret")
    server = Served(build_app(str(model_folder), SETTINGS))
    yield server
    server.close()
    assert not server.app.state.runner.healthy  # the application's shutdown ended its thread


EXTRA: dict[str, Any] = {"ignore_eos": True}


def test_completions(served: Served, engine: Engine):
    text = run(engine, engine.encode("the cat"), max_tokens=20, ignore_eos=True)[1]
    create = served.client.completions.create
    whole = create(model="tiny", prompt="the cat", max_tokens=20, temperature=0, extra_body=EXTRA)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (text, "length")
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 20
    pieces = list(create(model="tiny", prompt="the cat", max_tokens=20, temperature=0, stream=True, extra_body=EXTRA))
    assert "".join(piece.choices[0].text for piece in pieces) == text
    assert [piece.choices[0].finish_reason for piece in pieces[-2:]] == [None, "length"]
    assert len(pieces) > 5
    assert len({piece.id for piece in pieces}) == 1
    stop = text[6:9]
    stopped = create(model="tiny", prompt="the cat", max_tokens=20, temperature=0, stop=stop, extra_body=EXTRA)
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == (text[: text.find(stop)], "stop")


def test_chat(served: Served):
    create = served.client.chat.completions.create
    messages: Any = [{"role": "user", "content": "the cat"}]
    whole = create(model="tiny", messages=messages, max_tokens=20, temperature=0, extra_body=EXTRA)
    stream = create(
        model="tiny",
        messages=messages,
        max_completion_tokens=20,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=EXTRA,
    )
    pieces = list(stream)
    assert pieces[0].choices[0].delta.role == "assistant"
    texts = [choice.delta.content or "" for piece in pieces for choice in piece.choices]
    assert "".join(texts) == whole.choices[0].message.content
    assert pieces[-1].choices == []
    assert pieces[-1].usage is not None
    assert whole.usage is not None
    assert pieces[-1].usage.total_tokens == whole.usage.total_tokens
    assert pieces[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_the_stream_on_the_wire(served: Served):
    request = {"prompt": ["the", "a dog"], "max_tokens": 4, "stream": True, **EXTRA}
    headers = {"Authorization": "Bearer s3cret"}
    answer = httpx.post(f"{served.url}/v1/completions", json=request, headers=headers, timeout=60)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    parsed = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert {event["choices"][0]["index"] for event in parsed} == {0, 1}
    assert all("usage" not in event for event in parsed)
    assert sum(event["choices"][0]["finish_reason"] == "length" for event in parsed) == 2


def test_errors_are_the_client_library_s_own(served: Served):
    create = served.client.completions.create
    with pytest.raises(openai.BadRequestError) as bad:
        create(model="tiny", prompt="x", best_of=2)
    assert bad.value.param == "best_of"
    with pytest.raises(openai.NotFoundError):
        create(model="other", prompt="x")
    with pytest.raises(openai.APIStatusError) as large:
        create(model="tiny", prompt="x" * 60_000)
    assert large.value.status_code == 413
    stranger = openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    stranger.close()
    assert [model.id for model in served.client.models.list()] == ["tiny"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_generation(served: Served, stream: bool, monkeypatch: pytest.MonkeyPatch):
    runner = served.app.state.runner
    gate, noticed = Gate(monkeypatch), threading.Event()
    cancel = Job.cancel
    monkeypatch.setattr(Job, "cancel", lambda job: (cancel(job), noticed.set()))
    request: dict[str, Any] = {"model": "tiny", "prompt": "the cat", "max_tokens": 1000, "extra_body": EXTRA}
    if stream:
        gate.allow(5)
        answer = served.client.completions.create(stream=True, **request)
        assert next(iter(answer)).choices[0].text is not None
        answer.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            served.client.completions.create(timeout=0.2, **request)
        gate.wait_for_a_step()
    assert noticed.wait(30)
    gate.open()
    assert runner.wait_idle(30)
    texts = {generation for turn in gate.turns for generation in turn}
    assert [text.finished for text in texts] == [True]
    assert 1 <= texts.pop().completion_tokens <= 6
    assert runner.engine.pool.used == 0
    page = httpx.get(f"{served.url}/metrics", headers={"Authorization": "Bearer s3cret"}).text
    assert "sundog_requests_cancelled_total 1.0" in page
    assert "sundog_requests_running 0.0" in page
