"""Threads beside an event loop: nothing is lost, nothing is out of order, what fails is raised."""

import asyncio
import threading
from collections.abc import Iterator

import pytest

from data.rephrase.beside import Ahead, Keeper


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 40])
def test_every_item_is_taken_once_and_in_order(count: int) -> None:
    async def run() -> list[int]:
        ahead, found = Ahead(iter(range(count)), 8), []

        async def work() -> None:
            while (item := await ahead.take()) is not None:
                found.append(item)
                await asyncio.sleep(0)

        await asyncio.gather(*(work() for _ in range(3)))
        return found

    assert asyncio.run(run()) == list(range(count))


def test_no_more_is_read_ahead_than_twice_the_depth() -> None:
    read: list[int] = []

    def items() -> Iterator[int]:
        for item in range(1000):
            read.append(item)
            yield item

    async def run() -> None:
        ahead = Ahead(items(), 4)
        for taken in range(1, 50):
            await ahead.take()
            await asyncio.sleep(0.001)
            assert len(read) <= taken + 8

    asyncio.run(run())


def test_what_the_iterator_raises_is_raised_behind_what_came_before() -> None:
    def items() -> Iterator[int]:
        yield from range(8)
        raise ValueError("a broken part")

    found: list[int | None] = []

    async def run() -> None:
        ahead = Ahead(items(), 8)
        while True:
            found.append(await ahead.take())

    with pytest.raises(ValueError, match="a broken part"):
        asyncio.run(run())
    assert found[:1] == [0]


def test_all_that_was_put_is_kept_though_the_loop_ends_with_an_error() -> None:
    kept: list[int] = []

    async def run(keeper: Keeper) -> None:
        for item in range(100):
            await keeper.put(item)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Keeper(kept.append, 100) as keeper:
        asyncio.run(run(keeper))
    assert kept == list(range(100))


def test_a_keeper_that_is_behind_is_waited_for() -> None:
    begun, go, kept = threading.Event(), threading.Event(), list[int]()

    def keep(item: int) -> None:
        begun.set()
        assert go.wait(30)
        kept.append(item)

    async def run(keeper: Keeper) -> None:
        for item in range(4):  # one is in hand, three wait
            await keeper.put(item)
            assert begun.wait(30)
        late = asyncio.create_task(keeper.put(4))
        await asyncio.sleep(0.1)
        assert not late.done()
        go.set()
        await late

    with Keeper(keep, 3) as keeper:
        asyncio.run(run(keeper))
    assert kept == [0, 1, 2, 3, 4]


def test_what_keep_raises_ends_the_loop() -> None:
    def keep(item: int) -> None:
        raise OSError(f"no space for {item}")

    async def run(keeper: Keeper) -> None:
        while True:
            await keeper.put(1)

    with pytest.raises(OSError, match="no space for 1"), Keeper(keep, 3) as keeper:
        asyncio.run(run(keeper))
