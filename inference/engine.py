"""One model, many texts at once: continuous batching over a paged cache, one forward pass at a time."""

import os
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conf.errors import DataError
from conf.serving import EngineConfig
from data.files import read_json
from data.tokenize import load_tokenizer
from inference.attach import attach
from inference.detokenize import Detokenizer
from inference.drafters.dynamic_tree import DraftModel
from inference.drafting import BUSY, Drafter, DraftSize
from inference.generation import Generation, Logprob, Step
from inference.gguf_files import model_folder
from inference.grammar import Grammars
from inference.model_runner import Result, load_runner
from inference.pace import Pace
from inference.pages import PagePool
from inference.params import GREEDY, SamplingParams
from inference.prefill import Surroundings
from inference.ranks import RankedRunner, place
from inference.sampler import log_probabilities
from inference.scheduler import Scheduler, Span
from inference.settings import check_settings
from models.rope import inverse_frequencies

MAX_RUNNING = 8
COST_TRIALS = 3
MEMORY_SHARE = 8  # the cache takes at most this part of the machine's memory unless told otherwise


class PromptTooLong(DataError):
    """A prompt that leaves no room in the model's context."""


@dataclass
class EngineStats:
    """What an engine has done and holds."""

    steps: int
    prompt_tokens: int  # computed; without those found in the cache
    generated_tokens: int
    preemptions: int
    prefix_hit_tokens: int
    drafted_tokens: int
    drafted_right: int
    pages: int
    pages_used: int
    pages_remembered: int
    running: int
    waiting: int


class Engine:
    """A model folder, or a GGUF file, ready to generate, on the CPU.

    The methods that change or run texts may be called from one thread at a time; ``encode`` and ``start`` from any.

    Raises:
        DataError: the folder is not one that this project can read, or has no tokenizer.
        ConfigError: settings out of range.
    """

    def __init__(
        self, folder: str | Path, settings: EngineConfig | None = None, max_running: int = MAX_RUNNING
    ) -> None:
        self.folder = folder = model_folder(folder)
        self.settings = settings = settings or EngineConfig()
        check_settings(settings)
        runner = load_runner(folder, settings)
        self.tokenizer = load_tokenizer(folder)
        self.spec = runner.spec
        page_tokens = settings.page_tokens * settings.ranks
        pages = self._pages(max_running, page_tokens, runner.dtype)
        self.runner, self.cache = place(runner, settings.ranks, pages, page_tokens)
        self.pool = PagePool(pages, page_tokens, settings.prefix_cache)
        frequencies = inverse_frequencies(self.spec.head_dim, self.spec.rope)
        self._around = Surroundings(self.spec.layers, frequencies, self.pool)
        self.context = min(self.spec.context, pages * page_tokens)
        pace = Pace(settings.mixed_tokens, settings.mixed_slowdown)
        rows = settings.step_tokens * settings.ranks  # a chunk of a prompt is split
        self.scheduler = Scheduler(self.pool, max_running, rows, pace)
        self.eos_ids = frozenset({self.tokenizer.eos_id, *_declared_ends(self.folder)})
        self._grammars = Grammars(self.folder / "tokenizer.json", self.spec.vocab_size, self.tokenizer.eos_id)
        self._encoding = threading.Lock()  # the tokenizer is switched between modes
        self._prefix = self._prompt_prefix()
        self._steps = self._prompt_tokens = self._generated = 0
        self.drafter: Drafter | None = None
        if settings.draft_tokens:
            size = DraftSize(self._row_costs(settings.draft_tokens + BUSY), settings.draft_tokens)
            model = None
            if settings.draft_model:
                tokens = pages * settings.page_tokens
                model = DraftModel(
                    settings.draft_model, self.spec.vocab_size, tokens, settings.page_tokens, settings.pack
                )
            self.drafter = Drafter(size, lambda: len(self.scheduler.running), self.spec.vocab_size, model)
            self.scheduler.draft, self.scheduler.forget = self.drafter.propose, self.drafter.forget

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt, begun as the tokenizer begins a text; names of special tokens are plain text."""
        with self._encoding:
            tokens = self._prefix + self.tokenizer.encode(text)
        return tokens or [self.tokenizer.eos_id]  # what stands before a document in training

    def encode_template(self, text: str) -> list[int]:
        """The tokens of a text that a chat template wrote: special tokens are recognised, none is added."""
        with self._encoding:
            return self.tokenizer.encode(text, allow_special=True) or [self.tokenizer.eos_id]

    def start(
        self, prompt: Sequence[int], params: SamplingParams, salt: bytes = b"", task: str = "generate"
    ) -> Generation:
        """A text that has not been queued yet. Texts of different ``salt`` never share cached pages.

        Raises:
            DataError: an empty prompt, or ids outside the vocabulary.
            PromptTooLong: a prompt that leaves no room in the context.
            ConfigError: a grammar that cannot be read.
        """
        if not prompt:
            raise DataError("prompt", "", "must have at least one token", "give a text")
        room = self.context - len(prompt)
        if room < (task == "generate"):
            rule = f"must be shorter than the model's context ({self.context} tokens)"
            raise PromptTooLong("prompt", f"{len(prompt)} tokens", rule, "shorten the prompt")
        if not (min(prompt) >= 0 and max(prompt) < self.spec.vocab_size):
            raise DataError("prompt", "token ids", f"must be from 0 to {self.spec.vocab_size - 1}", "encode it again")
        if any(token >= self.spec.vocab_size for token in params.logit_bias):
            raise DataError("logit_bias", "token ids", f"must be below {self.spec.vocab_size}", "correct them")
        limit = room if params.max_tokens is None else min(room, params.max_tokens)
        matcher = None if params.grammar is None else self._grammars.matcher(params.grammar)
        text = Detokenizer(self.tokenizer.decode)
        methods = params.methods.resolved(self.settings) if task == "generate" else None
        generation = Generation(prompt, params, limit, text, self.eos_ids, salt, task, matcher, methods)
        generation.drafter = params.methods.drafter_for(self.settings)
        if methods is not None:
            attach(generation, methods, self.spec, self._around)
        return generation

    def start_many(self, prompt: Sequence[int], params: SamplingParams, n: int, salt: bytes = b"") -> list[Generation]:
        """``n`` texts from one prompt, which is computed once; seeds count up from the given one."""
        found: list[Generation] = []
        for index in range(n):
            own = params if params.seed is None or index == 0 else _with_seed(params, params.seed + index)
            found.append(self.start(prompt, own, salt))
            found[-1].leader = found[0] if index else None
        return found

    def submit(self, generation: Generation) -> None:
        """Queue a text; ``step`` goes on with it, its ``news`` fill."""
        self.scheduler.add(generation)

    def cancel(self, generation: Generation) -> None:
        """Forget a text and free its pages; harmless when it has ended."""
        self.scheduler.drop(generation)

    def close(self) -> None:
        """Let the other ranks end; an engine of one rank has nothing to close."""
        if isinstance(self.runner, RankedRunner):
            self.runner.close()

    @property
    def busy(self) -> bool:
        """Whether there is something to do."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    @property
    def stats(self) -> EngineStats:
        """Counters and gauges; may be read from any thread."""
        scheduler, pool = self.scheduler, self.pool
        return EngineStats(
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated,
            preemptions=scheduler.preemptions,
            prefix_hit_tokens=scheduler.prefix_hits,
            drafted_tokens=self.drafter.drafted if self.drafter else 0,
            drafted_right=self.drafter.right if self.drafter else 0,
            pages=pool.pages,
            pages_used=pool.used,
            pages_remembered=pool.remembered,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
        )

    def step(self) -> list[Generation]:
        """Run the model once over all texts that are due; returns those that have news."""
        touched = self.scheduler.expired()
        for generation in touched:
            generation.end("deadline")
            self.scheduler.drop(generation)
        spans = self.scheduler.plan()
        if not spans:
            return touched
        self._steps += 1
        prompts = [span.generation.prefilling for span in spans]
        start = time.perf_counter()
        result = self.runner.run(spans, self.cache)
        rows = sum(len(span.tokens) for span, prompt in zip(spans, prompts, strict=True) if prompt)
        self.scheduler.pace.saw(len(spans) - sum(prompts), rows, time.perf_counter() - start)
        greedy = _greedy_tokens(spans, result)
        for index, span in enumerate(spans):
            generation = span.generation
            try:
                self._advance(span, result.logits[index], result.hidden[index], greedy.get(index))
            except (DataError, AssertionError) as error:
                generation.fail(error)
            if generation.finished:
                self.scheduler.drop(generation)
            touched.append(generation)
        return touched

    def stream(self, prompt: Sequence[int], params: SamplingParams) -> Generator[Step]:
        """Generate token by token; closing the iterator frees the pages. Raises DataError as ``start`` does."""
        generation = self.start(prompt, params)
        self.submit(generation)
        try:
            while True:
                while generation.news:
                    news = generation.news.popleft()
                    if isinstance(news, Exception):
                        raise news
                    yield news
                if generation.finished:
                    return
                self.step()
        finally:
            self.cancel(generation)

    def _advance(self, span: Span, logits_RV: Tensor | None, hidden: Tensor | None, greedy: int | None) -> None:
        """What a computed span means for its text."""
        generation = span.generation
        if span.parents is not None:
            assert logits_RV is not None
            self._verify(span, span.parents, logits_RV)
            return
        if generation.prefilling:
            self._prompt_tokens += span.count
        self.scheduler.commit(generation, span.start + span.count)
        if generation.policy is not None and generation.policy.evicts:
            self._evict(generation)
        if hidden is not None:
            _add_embedding(generation, hidden, span.last)
            return
        if logits_RV is None:
            return
        if generation.params.prompt_logprobs and span.start + 1 < generation.prompt_tokens:
            _score_prompt(generation, span, logits_RV)
        if not span.last:
            return
        if generation.limit == 0:
            generation.end("length")
            return
        if self.drafter is not None:
            self.drafter.see(generation, logits_RV[-1:])
        self._choose(generation, logits_RV[-1], greedy)

    def _evict(self, generation: Generation) -> None:
        """Bring a text's cache back to what its policy allows; a page's worth above it is let be while it grows."""
        assert generation.policy is not None
        most = generation.policy.limit(generation.computed)
        slack = 0 if generation.computed < generation.prompt_tokens else self.settings.page_tokens
        count = generation.held if generation.held <= most + slack else most
        self.pool.release(self.cache.evict(generation, count))

    def _choose(self, generation: Generation, logits_V: Tensor, greedy: int | None = None) -> int:
        """The text's next token, accepted."""
        token = greedy
        if token is None:
            allowed = None if generation.matcher is None else generation.matcher.allowed()
            token = generation.sampler.choose(logits_V, generation.completion_tokens, allowed)
        self._generated += 1
        most = generation.params.logprobs
        generation.accept(token, None if most is None else Logprob(token, *log_probabilities(logits_V, token, most)))
        return token

    def _verify(self, span: Span, parents: Sequence[int], logits_RV: Tensor) -> None:
        """Follow a draft as long as it is what would have been chosen; keep the cache of that path alone."""
        generation, path = span.generation, [0]
        while True:
            logits_V = logits_RV[path[-1]]
            picked = None if self.drafter is None else self.drafter.pick(generation, path[-1], logits_V)
            token = self._choose(generation, logits_V, picked)
            right = (row for row, above in enumerate(parents) if above == path[-1] and span.tokens[row] == token)
            if generation.finished or (row := next(right, None)) is None:
                break
            path.append(row)
        if path != list(range(len(path))):
            slots = torch.tensor(generation.slots(span.place, len(span.tokens), self.pool.page_tokens))
            self.cache.move(slots[path], slots[: len(path)])
        self.scheduler.commit(generation, span.start + len(path))
        if self.drafter is not None:
            self.drafter.learn(generation, span.tokens, path, logits_RV)

    def _row_costs(self, most: int) -> dict[int, float]:
        """Seconds of a pass of 1 to ``most`` rows behind a short text: the best of a few, measured now."""
        costs = {}
        generation = self.start([0], SamplingParams(max_tokens=1))
        while len(generation.pages) * self.pool.page_tokens < most:
            page = self.pool.take(generation.pages[-1] if generation.pages else None)
            assert page is not None, "the cache is smaller than a draft"
            generation.add_page(page)
        for rows in range(1, most + 1):
            times = []
            for _ in range(COST_TRIALS):
                start = time.perf_counter()
                self.runner.run([Span(generation, 0, [0] * rows, list(range(-1, rows - 1)))], self.cache)
                times.append(time.perf_counter() - start)
            costs[rows] = min(times)
        generation.finished = True
        self.pool.release(generation.drop_pages())
        for rows in range(most, 1, -1):  # more rows never cost less: what says so is noise
            costs[rows - 1] = min(costs[rows - 1], costs[rows])
        return costs

    def _pages(self, max_running: int, page_tokens: int, dtype: torch.dtype) -> int:
        settings, spec = self.settings, self.spec
        wanted = settings.kv_tokens or spec.context * max_running
        if not settings.kv_tokens:
            token = 2 * spec.layers * spec.kv_heads * spec.head_dim * dtype.itemsize
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // MEMORY_SHARE
            wanted = min(wanted, max(memory // token, page_tokens))
        return max(1, -(-wanted // page_tokens))

    def _prompt_prefix(self) -> list[int]:
        """What the tokenizer's own post-processor puts before a text."""
        fast = self.tokenizer.fast
        plain, whole = (fast.encode("a", add_special_tokens=added).ids for added in (False, True))
        starts = range(len(whole) - len(plain) + 1)
        return next((whole[:i] for i in starts if whole[i : i + len(plain)] == plain), [])


def _with_seed(params: SamplingParams, seed: int) -> SamplingParams:
    return SamplingParams(**{**vars(params), "seed": seed})


def _greedy_tokens(spans: Sequence[Span], result: Result) -> dict[int, int]:
    """The most probable tokens of all spans that want just that, in one pass over the logits."""
    rows: list[tuple[int, Tensor]] = []
    for index, span in enumerate(spans):
        params, logits = span.generation.params, result.logits[index]
        free = span.generation.matcher is None and span.parents is None
        plain = params.temperature == GREEDY and not params.touches_logits and free
        if plain and logits is not None and len(logits) == 1:
            rows.append((index, logits))
    if not rows:
        return {}
    values, ids = torch.cat([logits for _, logits in rows]).max(1)
    found = zip(rows, values.isfinite().tolist(), ids.tolist(), strict=True)
    return {index: token for (index, _), finite, token in found if finite}


def _score_prompt(generation: Generation, span: Span, logits_RV: Tensor) -> None:
    """Log-probabilities of the prompt's tokens that the span's rows predict."""
    most = generation.params.logprobs or 0
    for row, logits_V in enumerate(logits_RV):
        place = span.start + row + 1
        if place < generation.prompt_tokens:
            token = generation.tokens[place]
            generation.prompt_logprobs.append(Logprob(token, *log_probabilities(logits_V, token, most)))


def _add_embedding(generation: Generation, hidden_SE: Tensor, last: bool) -> None:
    """The mean of the last layer's states over the text, at unit length."""
    total = hidden_SE.float().sum(0)
    generation.embedding = total if generation.embedding is None else generation.embedding + total
    if last:
        generation.embedding = torch.nn.functional.normalize(generation.embedding, dim=0)
        generation.end("stop")


def _declared_ends(folder: Path) -> list[int]:
    """The end-of-sequence ids of generation_config.json, which may name several."""
    path = folder / "generation_config.json"
    config: Any = read_json(path) if path.is_file() else {}
    ends = config.get("eos_token_id") if isinstance(config, dict) else None
    return [end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int)]
