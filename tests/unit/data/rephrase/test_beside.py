"""Threads beside an event loop: nothing is lost, nothing is out of order, what fails is raised."""

import asyncio
import gc
import sys
import threading
from collections.abc import Iterator

import pytest

from data.rephrase.beside import Ahead, Keeper, prompt_loop


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


def test_what_was_put_is_kept_when_put_returns() -> None:
    kept: list[int] = []

    async def run(keeper: Keeper[int]) -> None:
        for item in range(100):
            await keeper.put(item)
            assert kept[-1] == item

    with Keeper(kept.extend) as keeper:
        asyncio.run(run(keeper))
    assert kept == list(range(100))


def test_what_comes_while_others_are_kept_is_kept_together_next() -> None:
    begun, go, groups = threading.Event(), threading.Event(), list[list[int]]()

    def keep(items: list[int]) -> None:
        begun.set()
        assert go.wait(30)
        groups.append(items)

    async def run(keeper: Keeper[int]) -> None:
        puts = [asyncio.create_task(keeper.put(0))]
        await asyncio.to_thread(begun.wait, 30)
        puts += [asyncio.create_task(keeper.put(item)) for item in (1, 2, 3)]
        await asyncio.sleep(0.1)
        assert not any(put.done() for put in puts)
        go.set()
        await asyncio.gather(*puts)

    with Keeper(keep) as keeper:
        asyncio.run(run(keeper))
    assert groups == [[0], [1, 2, 3]]


def test_all_that_was_put_is_kept_though_the_loop_ends_with_an_error() -> None:
    go, kept = threading.Event(), list[int]()

    def keep(items: list[int]) -> None:
        assert go.wait(30)
        kept.extend(items)

    async def run(keeper: Keeper[int]) -> None:
        async with asyncio.TaskGroup() as group:
            for item in range(100):
                group.create_task(keeper.put(item))
            await asyncio.sleep(0)
            go.set()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Keeper(keep) as keeper:
        asyncio.run(run(keeper))
    assert kept == list(range(100))


def test_what_keep_raises_is_raised_where_it_was_put() -> None:
    def keep(items: list[int]) -> None:
        raise OSError(f"no space for {items[0]}")

    async def run(keeper: Keeper[int]) -> None:
        for _ in range(2):
            with pytest.raises(OSError, match="no space for 1"):
                await keeper.put(1)

    with pytest.raises(OSError, match="no space for 1"), Keeper(keep) as keeper:
        asyncio.run(run(keeper))


def test_a_prompt_loop_leaves_the_process_as_it_was() -> None:
    def state() -> tuple[int, float, int]:
        return gc.get_threshold()[0], sys.getswitchinterval(), gc.get_freeze_count()

    def inside() -> None:
        with prompt_loop():
            found.append(state())
            raise KeyboardInterrupt

    found = [state()]
    with pytest.raises(KeyboardInterrupt):
        inside()
    before, during = found
    assert (during[0] > before[0], during[1] < before[1], during[2] > before[2]) == (True, True, True)
    assert state() == before
