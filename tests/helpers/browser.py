"""A real browser, headless, through its driver's HTTP protocol (W3C WebDriver)."""

import base64
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's name of an element's id
OPTIONS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1000,700"]
START_SEC = 60.0


class Browser:
    """One window."""

    def __init__(self, driver: httpx.Client) -> None:
        self._driver = driver
        wanted = {"browserName": "chrome", "goog:chromeOptions": {"args": OPTIONS}}
        wanted["goog:loggingPrefs"] = {"browser": "ALL"}
        answer = driver.post("/session", json={"capabilities": {"alwaysMatch": wanted}}).json()["value"]
        self._session = f"/session/{answer['sessionId']}"

    def open(self, url: str) -> None:
        self._call("url", {"url": url})

    def text(self, selector: str) -> str:
        """What an element shows; empty where there is none."""
        return self.run(f"return document.querySelector({selector!r})?.innerText ?? ''")

    def run(self, script: str) -> Any:
        """What a script returns."""
        return self._call("execute/sync", {"script": script, "args": []})

    def type(self, selector: str, text: str) -> None:
        self._call(f"element/{self._find(selector)}/value", {"text": text})

    def click(self, selector: str) -> None:
        self._call(f"element/{self._find(selector)}/click", {})

    def complaints(self) -> list[str]:
        """What the page wrote into the console as errors since the last call."""
        entries = self._call("se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def screenshot(self, path: Path) -> None:
        answer = self._driver.get(f"{self._session}/screenshot").json()["value"]
        path.write_bytes(base64.b64decode(answer))

    def wait(self, selector: str, text: str, seconds: float = 60.0) -> None:
        """Until an element shows ``text``."""
        deadline = time.monotonic() + seconds
        while text not in (shown := self.text(selector)):
            assert time.monotonic() < deadline, f"{selector} shows {shown!r}, not {text!r}"
            time.sleep(0.05)

    def close(self) -> None:
        self._driver.delete(self._session)

    def _find(self, selector: str) -> str:
        return self._call("element", {"using": "css selector", "value": selector})[ELEMENT]

    def _call(self, command: str, content: dict[str, Any]) -> Any:
        answer = self._driver.post(f"{self._session}/{command}", json=content).json()["value"]
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser, or the test is skipped where there is none."""
    program = shutil.which("chromedriver")
    if program is None or not (shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("no chromium with chromedriver on this machine")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([program, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=START_SEC, trust_env=False) as driver:
            deadline = time.monotonic() + START_SEC
            while not _ready(driver):
                assert time.monotonic() < deadline, "the driver did not start"
                time.sleep(0.05)
            window = Browser(driver)
            try:
                yield window
            finally:
                window.close()
    finally:
        process.terminate()
        process.wait()


def _ready(driver: httpx.Client) -> bool:
    try:
        return bool(driver.get("/status").json()["value"]["ready"])
    except httpx.TransportError:
        return False
