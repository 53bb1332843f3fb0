"""The page at / in a real browser."""

from pathlib import Path

import pytest

from inference.engine import Engine
from inference.server import build_app
from tests.helpers.browser import browser
from tests.helpers.served import Served
from tests.unit.inference.builders import run

SETTINGS = {"model_name": "tiny", "max_concurrent": 2, "max_queue": 2, "max_tokens": 1000}


def test_a_person_talks_to_the_model(
    model_folder: Path, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUNDOG_API_TOKEN", "s3cret")
    prompt = engine.encode("user: the cat\nassistant:")
    _, expected, _ = run(engine, prompt, max_tokens=12, stop=("\nuser:", "\nsystem:"))
    with browser() as window:
        served = Served(build_app(str(model_folder), SETTINGS))
        try:
            window.open(served.url)
            window.wait("#model", "token")  # without the token nothing is told but that
            window.complaints()  # of the refusals
            window.type("#token", "s3cret")
            window.wait("#model", "tiny, 1024 tokens of context")
            window.run("for (const [id, value] of [['temperature', 0], ['tokens', 12]]) $(id).value = value")
            window.type("#text", "the cat")
            window.click("#send")
            window.wait("#talk .user", "the cat")
            window.wait("#load", "Tokens generated")
            window.wait("#stop:disabled", "Stop")
            assert window.run("return document.querySelector('#talk .assistant').textContent") == expected
            window.run("$('tokens').value = 1000")
            window.type("#text", "again")
            window.click("#send")
            window.click("#stop")
            window.wait("#stop:disabled", "Stop")
            window.run("$('tokens').value = 2000")  # more than the server allows: told, not thrown
            window.type("#text", "too much")
            window.click("#send")
            window.wait("#talk .error", "max_tokens: 2000 is more than this server allows")
            window.screenshot(tmp_path / "page.png")
            assert [line for line in window.complaints() if "400" not in line] == []
            window.click("#clear")
            assert window.text("#talk") == ""
        finally:
            served.close()
