import asyncio
import base64
import re
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from conf.errors import ConfigError, DataError
from inference.engine import Engine
from inference.model_runner import ModelRunner
from inference.server import build_app
from tests.unit.inference.builders import Gate, run

SETTINGS = {"model_name": "tiny", "max_concurrent": 2, "max_queue": 2, "max_body_bytes": 20_000, "max_tokens": 64}
Talk = Callable[[httpx.AsyncClient], Coroutine[Any, Any, None]]


@pytest.fixture
def app(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    monkeypatch.delenv("SUNDOG_API_TOKEN", raising=False)
    return build_app(str(model_folder), SETTINGS)


def talk(app: FastAPI, body: Talk) -> None:
    async def main() -> None:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await body(client)

    asyncio.run(main())
    assert app.state.runner.wait_idle(30)
    app.state.runner.close()


def assert_error(answer: httpx.Response, status: int, param: str | None = None, code: str | None = None) -> str:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert error["type"] == ("server_error" if status >= 500 else error["type"])
    if param is not None:
        assert error["param"] == param
    if code is not None:
        assert error["code"] == code
    return error["message"]


def test_models_health_and_metrics(app: FastAPI):
    async def body(client: httpx.AsyncClient) -> None:
        listed = (await client.get("/v1/models")).json()
        assert listed["object"] == "list"
        assert [card["id"] for card in listed["data"]] == ["tiny"]
        assert listed["data"][0]["max_model_len"] == 1024
        assert (await client.get("/v1/models/tiny")).json() == listed["data"][0]
        assert_error(await client.get("/v1/models/other"), 404, code="model_not_found")
        assert (await client.get("/health")).json() == {"status": "ok"}
        await client.post("/v1/completions", json={"prompt": "the cat", "max_tokens": 3, "ignore_eos": True})
        page = (await client.get("/metrics")).text
        assert "sundog_generation_tokens_total 3.0" in page
        assert 'sundog_requests_total{endpoint="/v1/completions",status="200"} 1.0' in page
        assert 'sundog_requests_total{endpoint="other",status="404"} 1.0' in page
        assert "sundog_requests_running 0.0" in page
        assert "sundog_time_to_first_token_seconds_count 1.0" in page

    talk(app, body)


def test_completions_are_what_the_engine_gives(app: FastAPI, engine: Engine):
    prompts = ["the cat", "a dog"]
    texts = [run(engine, engine.encode(p), max_tokens=9, ignore_eos=True)[1] for p in prompts]
    ids = [engine.encode(p) for p in prompts]
    request = {"max_tokens": 9, "temperature": 0, "ignore_eos": True, "model": "tiny"}

    async def body(client: httpx.AsyncClient) -> None:
        forms = [(prompts[0], texts[:1]), (prompts, texts), (ids[0], texts[:1]), (ids, texts)]
        for prompt, expected in forms:
            answer = (await client.post("/v1/completions", json={**request, "prompt": prompt})).json()
            assert [choice["text"] for choice in answer["choices"]] == expected
            assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
            assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
            asked, given = sum(len(part) for part in ids[: len(expected)]), 9 * len(expected)
            usage = {"prompt_tokens": asked, "completion_tokens": given, "total_tokens": asked + given}
            assert usage.items() <= answer["usage"].items()
            assert (answer["object"], answer["model"]) == ("text_completion", "tiny")

    talk(app, body)


def test_chat_uses_the_template_and_its_stops(app: FastAPI, engine: Engine):
    prompt = engine.encode("user: the cat\nassistant:")
    _, text, _ = run(engine, prompt, max_tokens=12, stop=("\nuser:", "\nsystem:"))
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]

    async def body(client: httpx.AsyncClient) -> None:
        for content in ("the cat", parts):
            request = {"messages": [{"role": "user", "content": content}], "temperature": 0}
            for limit in ({"max_tokens": 12}, {"max_completion_tokens": 12}):
                answer = (await client.post("/v1/chat/completions", json={**request, **limit})).json()
                assert answer["object"] == "chat.completion"
                assert answer["choices"][0]["message"] == {"role": "assistant", "content": text}
                assert answer["usage"]["prompt_tokens"] == len(prompt)

    talk(app, body)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"n": 99}, "n"),
    ({"best_of": 3}, "best_of"),
    ({"suffix": "x"}, "suffix"),
    ({"logprobs": 99}, "logprobs"),
    ({"logprobs": "x"}, "logprobs"),
    ({"logit_bias": {"5": 1000}}, "logit_bias"),
    ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ({"presence_penalty": 5}, "presence_penalty"),
    ({"min_p": 2}, "min_p"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "regex", "pattern": "("}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}, "response_format"),
    ({"temperature": 3}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 65}, "max_tokens"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": ""}, "stop"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["a"] * 5}, "prompt"),
    ({"prompt": [99999]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"max_tokens": True}, "max_tokens"),
    ({"top_k": "1"}, "top_k"),
    ({"stream": "no"}, "stream"),
]


def test_what_cannot_be_done_is_a_400_that_names_the_field(app: FastAPI):
    async def body(client: httpx.AsyncClient) -> None:
        for change, param in BAD:
            answer = await client.post("/v1/completions", json={"prompt": "the", **change})
            message = assert_error(answer, 400, param=param)
            assert next(iter(change)) in message, change

    talk(app, body)


def test_fields_that_ask_for_nothing_and_unknown_fields_are_accepted(app: FastAPI):
    neutral = {"n": 1, "best_of": 1, "echo": False, "logprobs": None, "logit_bias": {}, "presence_penalty": 0.0}
    neutral |= {"user": "someone", "response_format": {"type": "text"}, "brand_new_field": [1], "seed": -5, "top_k": -1}

    async def body(client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/completions", json={"prompt": "the", "max_tokens": 1, **neutral})
        assert answer.status_code == 200, answer.text

    talk(app, body)


def test_requests_that_are_none(app: FastAPI):
    async def body(client: httpx.AsyncClient) -> None:
        json_type = {"content-type": "application/json"}
        for content in (b"{", b"", b"[1]", b"\xff\xfe", b"null"):
            assert_error(await client.post("/v1/completions", content=content, headers=json_type), 400)
        assert_error(await client.post("/v1/chat/completions", json={}), 400, param="messages")
        assert_error(await client.post("/v1/chat/completions", json={"messages": []}), 400, param="messages")
        image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
        answer = await client.post("/v1/chat/completions", json={"messages": [image]})
        assert "image_url" in assert_error(answer, 400, param="messages")
        assert_error(await client.post("/v1/completions", json={"prompt": "a", "model": "gpt"}), 404, "model")
        too_long = await client.post("/v1/completions", json={"prompt": [1] * 1024})
        assert_error(too_long, 400, "prompt", "context_length_exceeded")
        assert_error(await client.get("/nothing"), 404)
        assert_error(await client.get("/v1/completions"), 405)

    talk(app, body)


def test_a_body_above_the_bound_is_refused_with_and_without_its_length(app: FastAPI):
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x" * 1000

    async def body(client: httpx.AsyncClient) -> None:
        assert_error(await client.post("/v1/completions", content=b"x" * 20_001), 413, code="request_too_large")
        assert_error(await client.post("/v1/completions", content=chunks()), 413, code="request_too_large")

    talk(app, body)


def test_the_token_is_asked_for_everywhere_but_at_health(model_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SUNDOG_API_TOKEN", "s3cret")
    app = build_app(str(model_folder), SETTINGS)

    async def body(client: httpx.AsyncClient) -> None:
        assert (await client.get("/health")).status_code == 200
        for path in ("/v1/models", "/metrics", "/nothing"):
            for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}):
                answer = await client.get(path, headers=given)
                assert_error(answer, 401, code="invalid_api_key")
                assert answer.headers["www-authenticate"] == "Bearer"
        right = {"Authorization": "Bearer s3cret"}
        assert (await client.get("/v1/models", headers=right)).status_code == 200
        assert "s3cret" not in (await client.get("/metrics", headers=right)).text

    talk(app, body)


def test_a_full_queue_is_a_429(app: FastAPI, monkeypatch: pytest.MonkeyPatch):
    gate = Gate(monkeypatch)

    async def body(client: httpx.AsyncClient) -> None:
        request = {"prompt": "the", "max_tokens": 2, "ignore_eos": True}
        accepted = [asyncio.create_task(client.post("/v1/completions", json=request)) for _ in range(5)]
        done, _ = await asyncio.wait(accepted, return_when=asyncio.FIRST_COMPLETED)
        (refused,) = (task.result() for task in done)
        assert_error(refused, 429, code="queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        assert (await client.get("/health")).status_code == 200  # the event loop does not wait for the model
        with monkeypatch.context() as patch:  # what is refused costs no work
            patch.setattr(app.state.runner.engine, "encode", lambda _: pytest.fail("a refused prompt was encoded"))
            assert_error(await client.post("/v1/completions", json=request), 429, code="queue_full")
            assert_error(await client.post("/v1/embeddings", json={"input": "the"}), 429, code="queue_full")
            assert_error(await client.post("/v1/completions", content=_never()), 429, code="queue_full")
        gate.open()
        answers = await asyncio.gather(*accepted)
        assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 200, 429]

    talk(app, body)


async def _never() -> AsyncIterator[bytes]:
    pytest.fail("the body of a refused request was read")
    yield b""


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_of_the_model_is_a_500_without_details(app: FastAPI, stream: bool, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(ModelRunner, "run", fail)

    async def body(client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/completions", json={"prompt": "the", "stream": stream})
        assert "secret" not in answer.text
        assert "internal_error" in answer.text
        assert answer.status_code == (200 if stream else 500)
        assert "[DONE]" not in answer.text

    talk(app, body)


def test_request_ids_are_echoed_when_they_are_harmless(app: FastAPI):
    async def body(client: httpx.AsyncClient) -> None:
        answer = await client.get("/health", headers={"X-Request-Id": "abc-1"})
        assert answer.headers["x-request-id"] == "abc-1"
        answer = await client.get("/health", headers={"X-Request-Id": "a" * 200})
        assert len(answer.headers["x-request-id"]) == 32

    talk(app, body)


@pytest.mark.parametrize("settings", [{"max_concurrent": 0}, {"max_queue": -1}, {"max_tokens": "x"}, {"colour": 1}])
def test_bad_settings(model_folder: Path, settings: dict[str, Any]):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        build_app(str(model_folder), settings)


def test_a_folder_that_is_no_model(tmp_path: Path):
    with pytest.raises(DataError, match=r"config\.json"):
        build_app(str(tmp_path), {})


def test_without_a_name_the_model_is_called_as_its_folder(model_folder: Path):
    async def body(client: httpx.AsyncClient) -> None:
        assert (await client.get("/v1/models")).json()["data"][0]["id"] == model_folder.name

    talk(build_app(str(model_folder), {}), body)


def test_several_texts_with_logprobs_and_the_prompt(app: FastAPI, engine: Engine):
    prompt = engine.encode("the cat")
    request = {"prompt": "the cat", "max_tokens": 4, "ignore_eos": True, "seed": 5, "n": 2, "echo": True, "logprobs": 2}

    async def body(client: httpx.AsyncClient) -> None:
        answer = (await client.post("/v1/completions", json=request)).json()
        first, second = answer["choices"]
        assert first["text"] != second["text"]
        for choice in (first, second):
            found = choice["logprobs"]
            assert choice["text"].startswith("the cat")
            assert len(found["tokens"]) == len(prompt) + 4
            assert found["token_logprobs"][0] is None
            assert all(value <= 0 for value in found["token_logprobs"][1:])
            assert found["text_offset"][len(prompt)] == len("the cat")
        assert answer["usage"]["prompt_tokens"] == len(prompt)
        scored = (await client.post("/v1/completions", json={**request, "n": 1, "max_tokens": 0})).json()["choices"][0]
        assert scored["text"] == "the cat"
        assert scored["logprobs"]["token_logprobs"] == pytest.approx(first["logprobs"]["token_logprobs"][: len(prompt)])
        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "logprobs": True, "top_logprobs": 2}
        content = (await client.post("/v1/chat/completions", json=chat)).json()["choices"][0]["logprobs"]["content"]
        assert all(len(entry["top_logprobs"]) == 2 for entry in content)

    talk(app, body)


def test_structured_output(app: FastAPI):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["cat", "dog"]}}}
    request = {"prompt": "the", "max_tokens": 20}

    async def body(client: httpx.AsyncClient) -> None:
        answer = (await client.post("/v1/completions", json={**request, "response_format": form})).json()
        assert answer["choices"][0]["text"] in ('"cat"', '"dog"')
        form.update(type="regex", pattern="c[ao]t")
        answer = (await client.post("/v1/completions", json={**request, "response_format": form})).json()
        assert answer["choices"][0]["text"] in ("cat", "cot")

    talk(app, body)


def test_embeddings_in_both_forms(app: FastAPI):
    async def body(client: httpx.AsyncClient) -> None:
        answer = (await client.post("/v1/embeddings", json={"input": ["the cat", "the cat", "a dog"]})).json()
        first, again, other = (entry["embedding"] for entry in answer["data"])
        assert first == pytest.approx(again, abs=1e-6)
        assert first != pytest.approx(other, abs=1e-2)
        assert sum(x * x for x in first) == pytest.approx(1, abs=1e-5)
        coded = (await client.post("/v1/embeddings", json={"input": "the cat", "encoding_format": "base64"})).json()
        raw = base64.b64decode(coded["data"][0]["embedding"])
        assert list(struct.unpack(f"<{len(first)}f", raw)) == pytest.approx(first, abs=1e-6)
        assert_error(await client.post("/v1/embeddings", json={"input": []}), 400, param="input")

    talk(app, body)


def test_the_page_and_readiness(app: FastAPI):
    async def body(client: httpx.AsyncClient) -> None:
        page = await client.get("/")
        assert page.headers["content-type"].startswith("text/html")
        assert "<title>Sundog</title>" in page.text
        assert (await client.get("/ready")).status_code == 200
        await client.post("/v1/completions", json={"prompt": "the cat", "max_tokens": 3})
        metrics = (await client.get("/metrics")).text
        assert "sundog_kv_pages_used 0.0" in metrics
        for name in re.findall(r"\bsundog_\w+", page.text):
            assert f"\n{name} " in metrics, name

    talk(app, body)


def test_a_lossy_method_is_named_in_the_answer_and_in_every_event(app: FastAPI):
    request = {"prompt": "the cat sat on the mat. " * 9, "max_tokens": 3, "ignore_eos": True}
    chosen = {"kv_policy": "h2o", "kv_budget": 0.5}

    async def body(client: httpx.AsyncClient) -> None:
        plain = (await client.post("/v1/completions", json=request)).json()
        assert "methods" not in plain
        answer = (await client.post("/v1/completions", json={**request, **chosen})).json()
        assert answer["methods"] == ["kv_policy=h2o:0.5"]
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
        stream = await client.post("/v1/completions", json={**request, **chosen, "stream": True})
        assert stream.text.count('"methods": ["kv_policy=h2o:0.5"]') == stream.text.count("data: {") > 0
        assert_error(await client.post("/v1/completions", json={**request, "kv_policy": "h3o"}), 400, "kv_policy")
        assert_error(await client.post("/v1/completions", json={**request, "kv_budget": 2}), 400, "kv_budget")

    talk(app, body)
