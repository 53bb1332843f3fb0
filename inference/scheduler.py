"""Who runs in the next step: continuous batching by a budget of rows (Orca, OSDI 2022; chunked prefill as in
Sarathi-Serve, arXiv:2403.02310).

A step holds the next token of every running text and then chunks of prompts, up to the budget. Prompts have a smaller
budget while texts are being generated, since a step takes as long as it has rows. When pages run out, the text that
came last gives its pages back and is computed again later; nothing else fails.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from inference.generation import Generation
from inference.pace import Pace
from inference.pages import PagePool, chained


@dataclass
class Span:
    """One text's part of a step: ``tokens`` at positions from ``start`` on.

    With ``parents`` the tokens are a draft tree behind the text's last token: the parent of token ``i`` is
    token ``parents[i]``, and its position is one more than its parent's; token 0 is the text's own.

    The last ``probes`` tokens are the prompt's last ones, which look at a chunk of it before their turn comes; nothing
    of them stays.
    """

    generation: Generation
    start: int
    tokens: list[int]
    parents: list[int] | None = None
    probes: int = 0

    @property
    def count(self) -> int:
        """Tokens without the probes."""
        return len(self.tokens) - self.probes

    @property
    def place(self) -> int:
        """Where the first token goes among those that the cache holds."""
        return self.start - self.generation.evicted

    @property
    def positions(self) -> list[int]:
        """Positions of the tokens."""
        length = len(self.generation.tokens)
        return depths(self.start, self.count, self.parents) + list(range(length - self.probes, length))

    @property
    def last(self) -> bool:
        """Whether the text is computed to its end with this span."""
        return self.parents is not None or self.start + self.count == len(self.generation.tokens)


def depths(start: int, count: int, parents: Sequence[int] | None) -> list[int]:
    """Positions of a chain of tokens, or of a tree."""
    if parents is None:
        return list(range(start, start + count))
    found = [start]
    for parent in parents[1:]:
        found.append(found[parent] + 1)
    return found


@dataclass
class Scheduler:
    """Decides, and keeps the books of pages and queues."""

    pool: PagePool
    max_running: int
    step_tokens: int  # rows of a step without generating texts
    pace: Pace  # rows of prompts in a step with generating texts
    draft: Callable[[Generation, int], tuple[list[int], list[int]]] | None = None
    forget: Callable[[Generation], None] | None = None  # told of every text that ends
    waiting: deque[Generation] = field(default_factory=deque)
    running: list[Generation] = field(default_factory=list)  # in order of arrival
    preemptions: int = 0
    prefix_hits: int = 0  # tokens

    def add(self, generation: Generation) -> None:
        """Queue a text."""
        self.waiting.append(generation)

    def drop(self, generation: Generation) -> None:
        """Forget a text, finished or not, and free its pages; harmless when it is not here."""
        generation.finished = True
        if generation in self.running:
            self.running.remove(generation)
        elif generation in self.waiting:
            self.waiting.remove(generation)
        self.pool.release(generation.drop_pages())
        if self.forget is not None:
            self.forget(generation)

    def expired(self) -> list[Generation]:
        """Texts beyond their deadline."""
        now = time.monotonic()
        return [g for g in (*self.running, *self.waiting) if g.deadline is not None and now > g.deadline]

    def plan(self) -> list[Span]:
        """The spans of the next step, pages included; empty when there is nothing to do."""
        spans: list[Span] = []
        for generation in [g for g in self.running if not g.prefilling]:
            if (span := self._decode(generation, spans)) is not None:
                spans.append(span)
        rows = sum(len(span.tokens) for span in spans)
        budget = self.step_tokens
        if spans:
            due = self.waiting or any(g.prefilling for g in self.running)
            budget = min(self.pace.rows(len(spans)), self.step_tokens - rows) if due else 0
        for generation in [g for g in self.running if g.prefilling]:
            budget -= self._prefill(generation, budget, spans)
        while self.waiting and budget > 0 and len(self.running) < self.max_running and self._admit():
            budget -= self._prefill(self.running[-1], budget, spans)
        return spans

    def commit(self, generation: Generation, computed: int) -> None:
        """The cache now holds ``computed`` tokens of the text: remember the pages that became full."""
        generation.computed = computed
        if not (self.pool.remember and generation.shares_prefix):
            return
        size, keys = self.pool.page_tokens, generation.keys
        for index in range(len(keys), computed // size):
            before = keys[-1] if keys else generation.salt
            tokens = generation.tokens[index * size : (index + 1) * size]
            keys.append(chained(before, tokens))
            self.pool.keep(generation.pages[index], keys[-1], chained(generation.salt, tokens), index * size)

    def _decode(self, generation: Generation, spans: list[Span]) -> Span | None:
        tokens, parents = [generation.tokens[-1]], None
        if self.draft is not None and generation.matcher is None and not generation.lossy:
            room = generation.limit - generation.completion_tokens - 1
            drafted, above = self.draft(generation, room) if room > 0 else ([], [])
            if drafted:
                tokens, parents = tokens + drafted, [-1, *above]
        if not self._make_room(generation, generation.held + len(tokens), spans):
            return None
        return Span(generation, generation.computed, tokens, parents)

    def _prefill(self, generation: Generation, budget: int, spans: list[Span]) -> int:
        """Add a chunk of at most ``budget`` rows; returns their number."""
        start, count, probes = generation.computed, min(budget, generation.pending), 0
        if generation.policy is not None and count > 0:
            count, probes = generation.policy.chunk(generation.held, generation.pending, budget)
        if generation.prefill is not None and count > 0:
            count, probes = generation.prefill.chunk(generation.pending, budget)
        if generation.params.prompt_logprobs:  # what is to be scored must not be seen before its turn
            probes = 0
        if count <= 0 or not self._make_room(generation, generation.held + count + probes, spans):
            return 0
        tokens = generation.tokens[start : start + count]
        if probes:
            tokens += generation.tokens[-probes:]
        spans.append(Span(generation, start, tokens, probes=probes))
        return count + probes

    def _admit(self) -> bool:
        """Move the first waiting text to the running ones, with the remembered beginning of its tokens."""
        generation = self.waiting[0]
        if generation.leader is not None and not generation.leader.finished and generation.leader.prefilling:
            return False
        size = self.pool.page_tokens
        shared: list[int] = []
        if generation.shares_prefix:
            shared = self.pool.match(generation.tokens[:-1], generation.salt)  # one token at least is to be computed
        length = len(generation.tokens) + 1
        if generation.policy is not None:
            length = generation.policy.room(length)
        needed = -(-length // size) - len(shared)
        for page in shared:
            self.pool.share(page)
        if needed > self.pool.available and self.running:
            self.pool.release(shared)
            return False
        self.waiting.popleft()
        for page in shared:
            generation.add_page(page)
        generation.computed = generation.cached_tokens = len(shared) * size
        self.prefix_hits += generation.cached_tokens
        self.running.append(generation)
        return True

    def _make_room(self, generation: Generation, length: int, spans: list[Span]) -> bool:
        """Give the text pages for ``length`` tokens, at the cost of later texts that are not in this step."""
        if generation not in self.running:  # was preempted for one before it
            return False
        while len(generation.pages) * self.pool.page_tokens < length:
            page = self.pool.take(generation.pages[-1] if generation.pages else None)
            if page is not None:
                generation.add_page(page)
                continue
            planned = [span.generation for span in spans]
            victim = next(g for g in reversed(self.running) if g is generation or g not in planned)
            self._preempt(victim)
            if victim is generation:
                return False
        return True

    def _preempt(self, generation: Generation) -> None:
        self.running.remove(generation)
        self.pool.release(generation.drop_pages())
        self.waiting.appendleft(generation)
        generation.preemptions += 1
        self.preemptions += 1
