"""One model thread for an event loop: bounded queues, steps of the engine, results handed over."""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence

from conf.errors import RankLost
from inference.engine import Engine
from inference.generation import Generation, Step
from inference.params import SamplingParams

STALL_TIMEOUT_SEC = 600.0  # the longest wait for a job's next step, its time in the queue included
IDLE_WAIT_SEC = 5.0  # between looks at the queue when nothing is announced; only a safety net
MAX_RETRY_SEC = 60
CLOSED_RETRY_SEC = 5  # when another server may be there
RATE_WINDOW_SEC = 10.0  # over which the speed is averaged

log = logging.getLogger(__name__)


class QueueFull(Exception):
    """More requests wait than the settings allow; ``retry_sec`` is when there may be room."""

    def __init__(self, message: str, retry_sec: int = 1) -> None:
        super().__init__(message)
        self.retry_sec = retry_sec


class Closed(QueueFull):
    """The server is shutting down, or its model cannot go on."""


class GenerationFailed(Exception):
    """The model failed on a request that was in order."""


class Job:
    """The texts of one request. Iterate it in the event loop that submitted it, then or on any error ``cancel``."""

    def __init__(self, generations: Sequence[Generation], runner: "Runner") -> None:
        self.generations = tuple(generations)
        self.cancelled = False
        self._runner = runner
        self._loop = asyncio.get_running_loop()
        self._results: asyncio.Queue[list[tuple[int, Step]] | Exception] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Step]]:
        """(index of the text, step) as they come; every text's last step has a finish reason.

        Raises GenerationFailed; QueueFull when the server shuts down; TimeoutError when nothing comes for
        ``STALL_TIMEOUT_SEC``.
        """
        unfinished = len(self.generations)
        while unfinished:
            async with asyncio.timeout(STALL_TIMEOUT_SEC):
                results = await self._results.get()
            if isinstance(results, Exception):
                raise results
            for index, step in results:
                unfinished -= step.finish_reason is not None
                yield index, step

    def cancel(self) -> None:
        """Stop working on it, within one step; harmless when it has ended."""
        self.cancelled = True
        self._runner.cancel(self)

    def deliver(self, results: list[tuple[int, Step]] | Exception) -> None:
        """Called by the model thread."""
        try:
            self._loop.call_soon_threadsafe(self._results.put_nowait, results)
        except RuntimeError:  # the loop has closed: nobody can read the rest
            self.cancelled = True
            self._runner.cancel(self)


class Runner:
    """Runs an engine in one thread, so that an event loop never waits for the model.

    The engine works on ``max_running`` texts at once; ``max_queue`` more wait in the order of arrival, as long as their
    prompts have ``max_queue_tokens`` tokens at most together.
    """

    def __init__(self, engine: Engine, max_queue: int, max_queue_tokens: int) -> None:
        self.engine, self.max_queue, self.max_queue_tokens = engine, max_queue, max_queue_tokens
        self._changed = threading.Condition()
        self._jobs: dict[Generation, tuple[Job, int]] = {}  # until it ends
        self._arrived: list[Generation] = []
        self._left: list[Generation] = []
        self._closed = False
        self._thread: threading.Thread | None = None
        self._rates: deque[tuple[float, int]] = deque()  # (when, tokens computed until then)

    @property
    def unfinished(self) -> int:
        """Texts that run or wait."""
        return len(self._jobs)

    @property
    def running(self) -> int:
        """Texts that the engine works on."""
        return len(self.engine.scheduler.running)

    @property
    def waiting(self) -> int:
        """Texts in the queue."""
        return max(0, self.unfinished - self.running)

    @property
    def healthy(self) -> bool:
        """Whether requests can be worked on."""
        return not self._closed and (self._thread is None or self._thread.is_alive())

    @property
    def tokens_per_sec(self) -> float:
        """Tokens computed a second, prompts included, over the last seconds."""
        if len(self._rates) < 2:
            return 0.0
        (first, before), (last, now) = self._rates[0], self._rates[-1]
        return (now - before) / max(last - first, 1e-3) if time.monotonic() - last < RATE_WINDOW_SEC else 0.0

    def prepare(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        n: int = 1,
        salt: bytes = b"",
        task: str = "generate",
    ) -> list[Generation]:
        """The texts of one request: ``n`` of every prompt. May be called from any thread.

        Raises DataError and ConfigError as ``Engine.start``.
        """
        if task == "embed":
            return [self.engine.start(prompt, params, salt, task) for prompt in prompts]
        return [g for prompt in prompts for g in self.engine.start_many(prompt, params, n, salt)]

    def submit(self, generations: Sequence[Generation]) -> Job:
        """Queue one request's texts, all or none. Call it in a running event loop.

        Raises QueueFull: no room for all of them, or the server is shutting down.
        """
        job = Job(generations, self)
        with self._changed:
            if self._closed:
                raise Closed("the server is shutting down", CLOSED_RETRY_SEC)
            self._check_room(generations)
            for index, generation in enumerate(generations):
                self._jobs[generation] = (job, index)
            self._arrived += generations
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="model", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return job

    def refuse_if_full(self) -> None:
        """Raises QueueFull where no text has room, so that a request in vain costs next to nothing."""
        with self._changed:
            self._check_places(1)

    def cancel(self, job: Job) -> None:
        """Drop a job's texts; a step in progress ends first."""
        with self._changed:
            for generation in job.generations:
                if self._jobs.pop(generation, None) is not None:
                    self._left.append(generation)
            self._changed.notify_all()

    def wait_idle(self, timeout: float) -> bool:
        """Wait until nothing runs or waits; False after ``timeout`` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._jobs or self._arrived or self._left), timeout)

    def close(self, timeout: float = 10.0) -> None:
        """Fail what is unfinished and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout)
        else:
            self.engine.close()

    def _check_room(self, generations: Sequence[Generation]) -> None:
        self._check_places(len(generations))
        tokens = self._queued_tokens()
        if tokens and tokens + sum(g.prompt_tokens for g in generations) > self.max_queue_tokens:
            raise QueueFull(f"{tokens} prompt tokens wait, of {self.max_queue_tokens}", self._retry_sec())

    def _check_places(self, texts: int) -> None:
        slots = self.engine.scheduler.max_running + self.max_queue
        if self.unfinished + texts > slots:
            raise QueueFull(f"{self.unfinished} texts run or wait, of {slots}", self._retry_sec())

    def _queued_tokens(self) -> int:
        return sum(g.prompt_tokens for g in self._jobs if g.computed == 0)

    def _retry_sec(self) -> int:
        """When what waits may have been computed, at the present speed."""
        rate = self.tokens_per_sec
        return min(MAX_RETRY_SEC, max(1, math.ceil(self._queued_tokens() / rate))) if rate else 1

    def _work(self) -> None:
        try:
            while self._take_changes():
                self._step()
            self.engine.close()
        finally:
            with self._changed:
                self._closed = True
                for job, _ in self._jobs.values():
                    job.deliver(Closed("the server is shutting down", CLOSED_RETRY_SEC))
                for generation in [*self.engine.scheduler.running, *self.engine.scheduler.waiting]:
                    self.engine.cancel(generation)
                self._jobs.clear()
                self._arrived.clear()
                self._left.clear()
                self._changed.notify_all()

    def _take_changes(self) -> bool:
        """Apply what arrived and left since the last step; wait until there is work. False: closed."""
        with self._changed:
            while not self._closed:
                for generation in self._arrived:
                    self.engine.submit(generation)
                for generation in self._left:
                    self.engine.cancel(generation)
                self._arrived.clear()
                self._left.clear()
                if self.engine.busy:
                    return True
                self._changed.notify_all()  # for wait_idle
                self._changed.wait(IDLE_WAIT_SEC)
            return False

    def _step(self) -> None:
        try:
            touched = self.engine.step()
        except RankLost:  # nothing more can be computed: the thread ends, and with it the server's health
            log.exception("a rank of the model is lost")
            raise
        except Exception:
            log.exception("a step of the model failed")
            touched = list(self.engine.scheduler.running)
            for generation in touched:  # it is unknown whose fault it was
                self.engine.cancel(generation)
                generation.fail(GenerationFailed("the model failed"))
        now, stats = time.monotonic(), self.engine.stats
        self._rates.append((now, stats.prompt_tokens + stats.generated_tokens))
        while now - self._rates[0][0] > RATE_WINDOW_SEC:
            self._rates.popleft()
        for job, results in self._news(touched):
            job.deliver(results)

    def _news(self, touched: Sequence[Generation]) -> list[tuple[Job, list[tuple[int, Step]] | Exception]]:
        """What each job is told; what has ended is forgotten first, so that whoever reads it finds the place free."""
        found: list[tuple[Job, list[tuple[int, Step]] | Exception]] = []
        steps: dict[int, tuple[Job, list[tuple[int, Step]]]] = {}
        with self._changed:
            for generation in touched:
                job, index = self._jobs.get(generation, (None, 0))
                if job is None:
                    continue
                if generation.finished:
                    del self._jobs[generation]
                while generation.news:
                    news = generation.news.popleft()
                    if isinstance(news, Exception):
                        found.append((job, GenerationFailed(str(news))))
                    else:
                        steps.setdefault(id(job), (job, []))[1].append((index, news))
            self._changed.notify_all()
        return [*steps.values(), *found]
