"""One model, many generations: each has its own cache and advances by one bounded forward pass at a time."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from conf.errors import DataError
from data.files import read_json
from data.tokenize import load_tokenizer
from inference.detokenize import Detokenizer, StopMatcher
from inference.sampler import Sampler, SamplingParams
from models.cache import KVCache
from models.hf import load_hf

PREFILL_CHUNK = 256  # prompt tokens in one step; bounds how long a prompt delays the others


class PromptTooLong(DataError):
    """A prompt that leaves no room in the model's context."""


@dataclass(frozen=True)
class Step:
    """One generated token's outcome.

    ``text`` may be empty while a character or a stop string is incomplete. ``finish_reason`` is set on the last step:
    ``stop`` (end-of-sequence token or stop string) or ``length`` (max_tokens or the end of the context).
    """

    token: int
    text: str
    finish_reason: str | None = None


class Engine:
    """A model folder ready to generate, on the CPU.

    The methods that run the model may be called from one thread at a time; ``encode`` from any.

    Raises:
        DataError: the folder is not one that this project can read, or has no tokenizer.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.model = load_hf(folder).eval()
        self.spec = self.model.spec
        self.tokenizer = load_tokenizer(folder)
        self.context = self.spec.context
        self.eos_ids = frozenset({self.tokenizer.eos_id, *_declared_ends(self.folder)})
        self._encoding = threading.Lock()  # the tokenizer is switched between modes
        self._prefix = self._prompt_prefix()

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt, begun as the tokenizer begins a text; names of special tokens are plain text."""
        with self._encoding:
            tokens = self._prefix + self.tokenizer.encode(text)
        return tokens or [self.tokenizer.eos_id]  # what stands before a document in training

    def encode_template(self, text: str) -> list[int]:
        """The tokens of a text that a chat template wrote: special tokens are recognised, none is added."""
        with self._encoding:
            return self.tokenizer.encode(text, allow_special=True) or [self.tokenizer.eos_id]

    def start(self, prompt: Sequence[int], params: SamplingParams) -> "Generation":
        """A generation that has not run yet.

        Raises:
            DataError: an empty prompt, or ids outside the vocabulary.
            PromptTooLong: a prompt that leaves no room in the context.
        """
        if not prompt:
            raise DataError("prompt", "", "must have at least one token", "give a text")
        if len(prompt) >= self.context:
            rule = f"must be shorter than the model's context ({self.context} tokens)"
            raise PromptTooLong("prompt", f"{len(prompt)} tokens", rule, "shorten the prompt")
        if not (min(prompt) >= 0 and max(prompt) < self.spec.vocab_size):
            raise DataError("prompt", "token ids", f"must be from 0 to {self.spec.vocab_size - 1}", "encode it again")
        return Generation(self, prompt, params)

    def stream(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[Step]:
        """Generate token by token; closing the iterator frees the cache. Raises DataError as ``start`` does."""
        generation = self.start(prompt, params)
        try:
            while not generation.finished:
                step = generation.step()
                if step is not None:
                    yield step
        finally:
            generation.close()

    def _prompt_prefix(self) -> list[int]:
        """What the tokenizer's own post-processor puts before a text."""
        fast = self.tokenizer.fast
        plain, whole = (fast.encode("a", add_special_tokens=added).ids for added in (False, True))
        starts = range(len(whole) - len(plain) + 1)
        return next((whole[:i] for i in starts if whole[i : i + len(plain)] == plain), [])


class Generation:
    """One request in progress: its cache, its random numbers and its text."""

    def __init__(self, engine: Engine, prompt: Sequence[int], params: SamplingParams) -> None:
        room = engine.context - len(prompt)
        self.limit = room if params.max_tokens is None else min(room, params.max_tokens)
        self.prompt_tokens, self.completion_tokens = len(prompt), 0
        self.finished = False
        self._engine, self._ignore_eos = engine, params.ignore_eos
        self._pending = list(prompt)  # tokens that the model has not seen
        self._cache: KVCache | None = None
        self._sampler = Sampler(params)
        self._text, self._stops = Detokenizer(engine.tokenizer.decode), StopMatcher(params.stop)

    @torch.inference_mode()
    def step(self) -> Step | None:
        """Run the model once: on a part of the prompt (None: no token yet) or on the last token."""
        assert not self.finished, "the generation has ended"
        if self._cache is None:
            self._cache = KVCache(self._engine.spec)
        model, start = self._engine.model, self._cache.length
        chunk, self._pending = self._pending[:PREFILL_CHUNK], self._pending[PREFILL_CHUNK:]
        positions = torch.arange(start, start + len(chunk))[None]
        hidden_BSE = model.hidden(torch.tensor([chunk]), positions, cache=self._cache)
        if self._pending:
            return None
        token = self._sampler.choose(model.head(hidden_BSE[0, -1]), self.completion_tokens)
        self.completion_tokens += 1
        self._pending = [token]
        return self._finish_or_go_on(token)

    def close(self) -> None:
        """End the generation and free its cache; harmless when it has ended."""
        self.finished = True
        self._cache = None

    def _finish_or_go_on(self, token: int) -> Step:
        ended = token in self._engine.eos_ids and not self._ignore_eos
        text, stopped = self._stops.feed("" if ended else self._text.push(token))
        reason = "stop" if ended or stopped else None
        if reason is None and self.completion_tokens >= self.limit:
            reason = "length"
        if reason is not None and not stopped:
            rest, stopped = self._stops.feed(self._text.flush())
            text += rest + ("" if stopped else self._stops.flush())
            reason = "stop" if stopped else reason
        if reason is not None:
            self.close()
        return Step(token, text, reason)


def _declared_ends(folder: Path) -> list[int]:
    """The end-of-sequence ids of generation_config.json, which may name several."""
    path = folder / "generation_config.json"
    config: Any = read_json(path) if path.is_file() else {}
    ends = config.get("eos_token_id") if isinstance(config, dict) else None
    return [end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int)]
