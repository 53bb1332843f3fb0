"""Many requests, one model thread: a bounded queue, round-robin steps, results handed to an event loop."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence

from inference.engine import Engine, Generation, Step
from inference.sampler import SamplingParams

STALL_TIMEOUT_SEC = 600.0  # the longest wait for a job's next step, its time in the queue included
IDLE_WAIT_SEC = 5.0  # between looks at the queue when nothing is announced; only a safety net

log = logging.getLogger(__name__)


class QueueFull(Exception):
    """More requests wait than the settings allow."""


class GenerationFailed(Exception):
    """The model failed on a request that was in order."""


class Job:
    """The prompts of one request. Iterate it in the event loop that submitted it, then or on any error ``cancel``."""

    def __init__(self, generations: Sequence[Generation], runner: "Runner") -> None:
        self.generations = tuple(generations)
        self.cancelled = False
        self._runner = runner
        self._loop = asyncio.get_running_loop()
        self._results: asyncio.Queue[tuple[int, Step] | BaseException] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Step]]:
        """(index of the prompt, step) as they come; every prompt's last step has a finish reason.

        Raises GenerationFailed; QueueFull when the server shuts down; TimeoutError when nothing comes for
        ``STALL_TIMEOUT_SEC``.
        """
        unfinished = len(self.generations)
        while unfinished:
            async with asyncio.timeout(STALL_TIMEOUT_SEC):
                result = await self._results.get()
            if isinstance(result, BaseException):
                raise result
            unfinished -= result[1].finish_reason is not None
            yield result

    def cancel(self) -> None:
        """Stop working on it, within one step; harmless when it has ended."""
        self.cancelled = True
        self._runner.wake()

    def deliver(self, result: tuple[int, Step] | BaseException) -> None:
        """Called by the model thread."""
        try:
            self._loop.call_soon_threadsafe(self._results.put_nowait, result)
        except RuntimeError:  # the loop has closed: nobody can read the rest
            self.cancelled = True


class Runner:
    """Runs an engine's generations in one thread, so that an event loop never waits for the model.

    ``max_concurrent`` generations take turns, one step each; ``max_queue`` more wait in the order of arrival.
    """

    def __init__(self, engine: Engine, max_concurrent: int, max_queue: int) -> None:
        self.engine, self.max_concurrent, self.max_queue = engine, max_concurrent, max_queue
        self._changed = threading.Condition()
        self._active: deque[tuple[Job, int]] = deque()
        self._waiting: deque[tuple[Job, int]] = deque()
        self._stepping: tuple[Job, int] | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> int:
        """Generations that take turns now."""
        return len(self._active) + (self._stepping is not None)

    @property
    def waiting(self) -> int:
        """Generations in the queue."""
        return len(self._waiting)

    @property
    def healthy(self) -> bool:
        """Whether submitted work will be done."""
        return not self._closed and (self._thread is None or self._thread.is_alive())

    def submit(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Job:
        """Queue the prompts of one request, all or none. Call it in a running event loop.

        Raises:
            QueueFull: try again later.
            DataError: a prompt does not fit the model; see ``Engine.start``.
        """
        job = Job([self.engine.start(prompt, params) for prompt in prompts], self)
        with self._changed:
            if self._closed:
                raise QueueFull("the server is shutting down")
            if self.running + self.waiting + len(prompts) > self.max_concurrent + self.max_queue:
                raise QueueFull(f"{self.running} requests are running and {self.waiting} waiting")
            self._waiting.extend((job, index) for index in range(len(prompts)))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="model", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return job

    def wake(self) -> None:
        """Drop what was cancelled; a step in progress ends first."""
        with self._changed:
            self._drop_cancelled()
            self._changed.notify_all()

    def wait_idle(self, timeout: float) -> bool:
        """Wait until nothing runs or waits; False after ``timeout`` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self.running or self.waiting), timeout)

    def close(self, timeout: float = 10.0) -> None:
        """Fail what is unfinished and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout)

    def _work(self) -> None:
        try:
            while (turn := self._next_turn()) is not None:
                self._step(*turn)
        finally:
            with self._changed:
                self._closed = True
                interrupted = [] if self._stepping is None else [self._stepping]
                for job, index in (*interrupted, *self._active, *self._waiting):
                    job.generations[index].close()
                    job.deliver(QueueFull("the server is shutting down"))
                self._active.clear()
                self._waiting.clear()
                self._stepping = None
                self._changed.notify_all()

    def _next_turn(self) -> tuple[Job, int] | None:
        """The generation whose step is next; waits for one. None: closed."""
        with self._changed:
            while not self._closed:
                self._drop_cancelled()
                while self._waiting and len(self._active) < self.max_concurrent:
                    self._active.append(self._waiting.popleft())
                if self._active:
                    self._stepping = self._active.popleft()
                    return self._stepping
                self._changed.notify_all()  # for wait_idle
                self._changed.wait(IDLE_WAIT_SEC)
            return None

    def _drop_cancelled(self) -> None:
        for queue in (self._active, self._waiting):
            for job, index in [turn for turn in queue if turn[0].cancelled]:
                job.generations[index].close()
                queue.remove((job, index))

    def _step(self, job: Job, index: int) -> None:
        generation = job.generations[index]
        result: tuple[int, Step] | GenerationFailed | None = None
        try:
            step = generation.step()
            result = None if step is None else (index, step)
        except Exception as error:
            log.exception("a generation failed")
            generation.close()
            job.cancelled = True
            result = GenerationFailed(str(error))
        with self._changed:
            self._stepping = None
            if not generation.finished:
                self._active.append((job, index))
        if result is not None:  # only now, so that whoever reads the last step finds the place free
            job.deliver(result)
