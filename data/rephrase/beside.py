"""What runs in threads beside an event loop: reading ahead of it, and keeping what it found."""

import asyncio
import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")
BEHIND_SEC = 0.01  # between looks at a keeper that is behind


class Ahead(Generic[T]):
    """Items of an iterator that are read in a thread, ``depth`` at once, before they are due."""

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._items, self._depth = items, depth
        self._ready: deque[T] = deque()
        self._reading: asyncio.Task[None] | None = None
        self._ended = False

    async def take(self) -> T | None:
        """The next item, None behind the last one. Raises what the iterator raises."""
        while True:
            if self._reading is not None and self._reading.done():
                self._reading.result()
                self._reading = None
            if self._reading is None and not self._ended and len(self._ready) < self._depth:
                self._reading = asyncio.create_task(self._read())
            if self._ready:
                return self._ready.popleft()
            if self._reading is None:
                return None
            await asyncio.wait([self._reading])

    async def _read(self) -> None:
        found = await asyncio.to_thread(lambda: list(itertools.islice(self._items, self._depth)))
        self._ready.extend(found)
        self._ended = len(found) < self._depth


class Keeper:
    """A thread that calls ``keep`` with what is put, in that order; at most ``most`` wait. Use as a context."""

    def __init__(self, keep: Callable[..., None], most: int) -> None:
        self._keep, self._most = keep, most
        self._waiting: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="keeper")

    def __enter__(self) -> "Keeper":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Waits until all is kept. Raises what ``keep`` raised."""
        self._waiting.put(None)
        self._thread.join()
        self._raise()

    async def put(self, *item: Any) -> None:
        """Hands an item on; waits while too many do. Raises what ``keep`` raised."""
        self._raise()
        while self._waiting.qsize() >= self._most:
            await asyncio.sleep(BEHIND_SEC)
            self._raise()
        self._waiting.put(item)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            try:
                self._keep(*item)
            except BaseException as error:
                self._error = error
                return
