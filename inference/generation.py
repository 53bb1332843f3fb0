"""One text in progress: its tokens, its pages of the cache, its random numbers and what has been said of it."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from inference.detokenize import Detokenizer, StopMatcher
from inference.grammar import Matcher
from inference.methods import Methods
from inference.params import SamplingParams
from inference.policies import KVPolicy
from inference.sampler import Sampler

if TYPE_CHECKING:
    from inference.prefill.base import PrefillStrategy

MAX_RUNS = 4  # runs of adjacent pages that attention reads in place; more are copied together first


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability under the model, and the most probable tokens at its place."""

    token: int
    value: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Step:
    """One generated token's outcome.

    ``text`` may be empty while a character or a stop string is incomplete. ``finish_reason`` is set on the last step:
    ``stop`` (end-of-sequence token, stop string or complete grammar), ``length`` (max_tokens or the end of the context)
    or ``deadline``, which comes without a token (-1).
    """

    token: int
    text: str
    finish_reason: str | None = None
    logprob: Logprob | None = None


class Generation:
    """A request's state between steps of the engine. ``task`` is ``generate`` or ``embed``."""

    def __init__(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        limit: int,
        text: Detokenizer,
        eos_ids: frozenset[int],
        salt: bytes = b"",
        task: str = "generate",
        matcher: Matcher | None = None,
        methods: Methods | None = None,
    ) -> None:
        self.params, self.limit, self.salt, self.task = params, limit, salt, task
        self.tokens = list(prompt)  # and the output, as it comes
        self.prompt_tokens, self.completion_tokens, self.cached_tokens = len(prompt), 0, 0
        self.finished = False
        self.leader: Generation | None = None  # computes the same prompt; wait for its pages
        self.preemptions = 0
        self.computed = 0  # tokens that the model has seen
        self.evicted = 0  # of them, those whose keys and values are no longer in the cache
        self.policy: KVPolicy | None = None  # None: all are kept and read
        self.prefill: PrefillStrategy | None = None  # None: all rows are computed over all tokens
        self.drafter = ""  # none
        self.decode_layers = 0 if methods is None else methods.decode_layers or 0
        self.lossy = () if methods is None else methods.lossy  # names of what may change the output
        self.pages: list[int] = []
        self.keys: list[bytes] = []  # of the full pages, as far as they were needed
        self.runs: list[tuple[int, int]] = []  # [first page, behind the last page) of adjacent pages
        self.embedding: Tensor | None = None  # sum of the hidden states so far, for ``embed``
        self.prompt_logprobs: list[Logprob] = []
        self.news: deque[Step | Exception] = deque()  # not yet fetched
        self.sampler = Sampler(params, prompt)
        self.matcher = matcher
        self.deadline = None if params.deadline_sec is None else time.monotonic() + params.deadline_sec
        self._text, self._stops = text, StopMatcher(params.stop)
        self._ends = (frozenset() if params.ignore_eos else eos_ids) | frozenset(params.stop_ids)

    @property
    def pending(self) -> int:
        """Tokens that the model has not seen: 1 while generating, more while the prompt is computed."""
        return len(self.tokens) - self.computed

    @property
    def prefilling(self) -> bool:
        """Whether more than the last token is still to be computed."""
        return self.pending > 1 or self.computed == 0

    @property
    def shares_prefix(self) -> bool:
        """Whether remembered pages can stand for its beginning: not where every position's result is asked for."""
        return self.task == "generate" and not self.params.prompt_logprobs and not self.lossy

    @property
    def held(self) -> int:
        """Tokens in the cache; a new one's place is behind them, its position is ``computed``."""
        return self.computed - self.evicted

    def add_page(self, page: int) -> None:
        """One more page at the end."""
        self.pages.append(page)
        if self.runs and self.runs[-1][1] == page:
            self.runs[-1] = (self.runs[-1][0], page + 1)
        else:
            self.runs.append((page, page + 1))

    def drop_pages(self) -> list[int]:
        """Give up all pages, and with them what was computed; returns them for release."""
        pages, self.pages, self.runs, self.keys = self.pages, [], [], []
        self.computed = self.evicted = 0
        if self.policy is not None:
            self.policy.reset()
        if self.prefill is not None:
            self.prefill.reset()
        if not self.finished:  # what was gathered along the way comes again
            self.embedding, self.prompt_logprobs = None, []
        return pages

    def trim_pages(self, count: int) -> list[int]:
        """Give up all pages behind the first ``count``; returns them for release."""
        kept, rest = self.pages[:count], self.pages[count:]
        if rest:
            self.pages, self.runs = [], []
            for page in kept:
                self.add_page(page)
        return rest

    def slots(self, start: int, count: int, page_tokens: int) -> list[int]:
        """Places in the cache of ``count`` tokens from the ``start``-th held one on."""
        pages = self.pages
        return [pages[p // page_tokens] * page_tokens + p % page_tokens for p in range(start, start + count)]

    def spans(self, length: int, page_tokens: int) -> list[tuple[int, int]]:
        """The first ``length`` held tokens' places as [start, end) of adjacent ones."""
        found = []
        for first, behind in self.runs:
            if length <= 0:
                break
            count = min(length, (behind - first) * page_tokens)
            found.append((first * page_tokens, first * page_tokens + count))
            length -= count
        return found

    def accept(self, token: int, logprob: Logprob | None = None) -> None:
        """Make ``token`` the next of the output, and find out whether it is the last."""
        self.tokens.append(token)
        self.completion_tokens += 1
        self.sampler.count(token)
        ended = token in self._ends
        if self.matcher is not None and not ended:
            self.matcher.push(token)
        complete = self.matcher is not None and self.matcher.complete
        text, stopped = self._stops.feed("" if ended else self._text.push(token))
        reason = "stop" if ended or stopped or complete else None
        if reason is None and self.completion_tokens >= self.limit:
            reason = "length"
        if reason is not None and not stopped:
            rest, stopped = self._stops.feed(self._text.flush())
            text += rest + ("" if stopped else self._stops.flush())
            reason = "stop" if stopped else reason
        self.finished = reason is not None
        self.news.append(Step(token, text, reason, logprob))

    def end(self, reason: str) -> None:
        """Finish without another token; what was held back is said."""
        rest, stopped = self._stops.feed(self._text.flush())
        self.finished = True
        self.news.append(Step(-1, rest + ("" if stopped else self._stops.flush()), reason))

    def fail(self, error: Exception) -> None:
        """Finish with an error."""
        self.finished = True
        self.news.append(error)
