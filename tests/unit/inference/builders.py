"""A tiny model folder for the tests."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from data.tokenize import load_tokenizer, train_tokenizer
from inference.engine import Engine
from inference.generation import Generation
from inference.params import SamplingParams
from models.decoder import Decoder, ModelSpec
from models.hf import save_hf

TEXT = "the cat sat on the mat. the dog sat on the log. a na\u00efve caf\u00e9 \u20ac \U0001f600 " * 5


def make_folder(folder: Path, seed: int = 0, context: int = 1024, **changes: Any) -> Path:
    train_tokenizer([TEXT], 290, folder.parent / "tokenizer")
    vocab = load_tokenizer(folder.parent / "tokenizer").vocab_size
    sizes: dict[str, Any] = {"layers": 2, **changes}
    spec = ModelSpec(vocab, 32, heads=4, kv_heads=2, head_dim=8, ffn_dim=64, init_std=0.3, context=context, **sizes)
    return save_hf(Decoder(spec).initialise(seed), folder, folder.parent / "tokenizer")


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def run(engine: Engine, prompt: list[int], **params: Any) -> tuple[list[int], str, str | None]:
    """(tokens, text, finish reason) of a whole generation."""
    values: dict[str, Any] = {"temperature": 0.0, **params}
    steps = list(engine.stream(prompt, SamplingParams(**values)))
    return [step.token for step in steps], "".join(step.text for step in steps), steps[-1].finish_reason


def ids(engine: Engine, prompt: list[int], params: SamplingParams) -> list[int]:
    """The tokens of a whole generation."""
    return [step.token for step in engine.stream(prompt, params)]


class Gate:
    """Holds the model thread before each step of the engine, and records which texts every step touched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.turns: list[list[Generation]] = []
        self._entered, self._permits = threading.Semaphore(0), threading.Semaphore(0)
        self._open = False
        inner = Engine.step

        def step(engine: Engine) -> list[Generation]:
            self._entered.release()
            assert self._open or self._permits.acquire(timeout=60)
            self.turns.append(inner(engine))
            return self.turns[-1]

        monkeypatch.setattr(Engine, "step", step)

    def allow(self, steps: int) -> None:
        self._permits.release(steps)

    def open(self) -> None:
        self._open = True
        self._permits.release()

    def wait_for_a_step(self) -> None:
        assert self._entered.acquire(timeout=60)
