"""What one request asks of the engine."""

import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from conf.errors import ConfigError
from inference.methods import Methods

MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_BIASES = 1024
GREEDY = 0.0


@dataclass(frozen=True)
class Grammar:
    """A form that the output must have: a JSON schema (as text; ``{}`` is any object) or a regular expression."""

    kind: Literal["json", "regex"]
    source: str

    @classmethod
    def of_schema(cls, schema: Any) -> "Grammar":
        return cls("json", json.dumps(schema, sort_keys=True))


@dataclass(frozen=True)
class SamplingParams:
    """Choices of one request.

    The order is: ``logit_bias``, penalties, ``grammar``, ``temperature``, ``top_k``, ``top_p``, ``min_p``.
    ``temperature`` 0 is greedy and ignores what follows it and ``seed``. A ``seed`` makes the request reproducible,
    whatever runs beside it; None draws a fresh one. ``stop`` strings end the text and are not part of it.
    ``max_tokens`` None means up to the context.

    Raises ConfigError for a value out of range.
    """

    max_tokens: int | None = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    min_p: float = 0.0  # of the most probable token's probability
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0  # taken from the logit of every token of the output
    frequency_penalty: float = 0.0  # taken once for each time that the token is in the output
    repetition_penalty: float = 1.0  # divides positive, multiplies negative logits of tokens in prompt or output
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None  # most probable tokens to report beside each chosen one; None: no log-probabilities
    prompt_logprobs: bool = False  # report the log-probability of every prompt token too, as many as ``logprobs`` says
    grammar: Grammar | None = None
    deadline_sec: float | None = None  # from arrival; what is there by then is the answer
    methods: Methods = field(default_factory=Methods)

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 0:
            raise ConfigError("max_tokens", self.max_tokens, "must not be negative", "ask for one token or more")
        if self.max_tokens == 0 and not self.prompt_logprobs:
            raise ConfigError("max_tokens", 0, "must be at least 1", "ask for one token or more")
        if len(self.stop) > MAX_STOPS or not all(self.stop):
            raise ConfigError("stop", list(self.stop), f"at most {MAX_STOPS} strings, none empty", "give fewer strings")
        if len(self.logit_bias) > MAX_BIASES:
            value = f"{len(self.logit_bias)} tokens"
            raise ConfigError("logit_bias", value, f"at most {MAX_BIASES} tokens", "give fewer tokens")
        for name, low, high, rule in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ConfigError(name, value, rule, "choose another value")
        for token, bias in self.logit_bias.items():
            if not -100 <= bias <= 100 or token < 0:
                raise ConfigError("logit_bias", {token: bias}, "token ids to values from -100 to 100", "correct it")

    @property
    def touches_logits(self) -> bool:
        """Whether anything changes the model's logits before a token is chosen."""
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        return bool(self.logit_bias or penalties or self.grammar)


_TINY = math.ulp(0.0)
_RANGES = (
    ("temperature", 0.0, 100.0, "must be from 0 (greedy) to 100"),
    ("top_p", _TINY, 1.0, "must be above 0 and at most 1"),
    ("top_k", 0, 2**31, "must not be negative (0 keeps all tokens)"),
    ("min_p", 0.0, 1.0, "must be from 0 to 1"),
    ("presence_penalty", -2.0, 2.0, "must be from -2 to 2"),
    ("frequency_penalty", -2.0, 2.0, "must be from -2 to 2"),
    ("repetition_penalty", 0.01, 100.0, "must be from 0.01 to 100"),
    ("logprobs", 0, MAX_LOGPROBS, f"must be from 0 to {MAX_LOGPROBS}"),
    ("deadline_sec", _TINY, 86400.0, "must be above 0 and at most a day"),
)
