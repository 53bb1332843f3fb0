"""Output that must follow a JSON schema or a regular expression, through the llguidance library."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conf.errors import ConfigError
from inference.params import Grammar

try:
    from llguidance import LLMatcher, LLTokenizer
except ImportError:  # an optional part of the server's dependencies
    LLMatcher = LLTokenizer = None


class Matcher:
    """Where one output stands in its grammar."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    @property
    def complete(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> Tensor:
        """Which tokens may come next, bool [vocabulary]."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(bits, count=self._vocab_size, bitorder="little")
        return torch.from_numpy(allowed.view(bool))

    def push(self, token: int) -> None:
        """Advance by a token that was allowed."""
        assert self._matcher.consume_token(token), f"token {token} is not allowed by the grammar"


class Grammars:
    """Makes matchers for one tokenizer; the table of its tokens is built once, at the first use."""

    def __init__(self, tokenizer_file: Path, vocab_size: int, eos_id: int) -> None:
        self._file, self._vocab_size, self._eos_id = tokenizer_file, vocab_size, eos_id
        self._tokenizer: Any = None

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher at the start of the grammar.

        Raises ConfigError for a grammar that cannot be read, or without the library.
        """
        if LLMatcher is None or LLTokenizer is None:
            raise ConfigError(
                "response_format", grammar.kind, "llguidance is not installed", "pip install 'sundog[serve]'"
            )
        if self._tokenizer is None:
            text = self._file.read_text(encoding="utf-8")
            self._tokenizer = LLTokenizer(text, n_vocab=self._vocab_size, eos_token=self._eos_id)
        make = LLMatcher.grammar_from_json_schema if grammar.kind == "json" else LLMatcher.grammar_from_regex
        try:
            found = make(grammar.source)
        except ValueError as error:
            raise _refused(grammar, str(error)) from error
        if problem := LLMatcher.validate_grammar(found, self._tokenizer):
            raise _refused(grammar, problem)
        return Matcher(LLMatcher(self._tokenizer, found), self._vocab_size)


def _refused(grammar: Grammar, problem: str) -> ConfigError:
    kind = {"json": "a JSON schema that llguidance knows", "regex": "a regular expression"}[grammar.kind]
    rule = f"must be {kind}: {problem.strip().splitlines()[0][:200]}"
    return ConfigError("response_format", grammar.source[:80], rule, "correct it")
