import asyncio
import itertools

import pytest

from inference.engine import Engine, Generation, Step
from inference.runner import GenerationFailed, Job, QueueFull, Runner
from inference.sampler import SamplingParams
from tests.unit.inference.builders import Gate, run

PARAMS = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


async def collect(job: Job) -> list[list[int]]:
    tokens: list[list[int]] = [[] for _ in job.generations]
    async for index, step in job:
        tokens[index].append(step.token)
    return tokens


def test_results_equal_those_of_the_engine(engine: Engine):
    prompts = [engine.encode(text) for text in ("the cat", "a dog sat", "on")]
    runner = Runner(engine, 2, 8)

    async def main() -> list[list[list[int]]]:
        jobs = [runner.submit(prompts, PARAMS), runner.submit(prompts[:1], PARAMS)]
        return list(await asyncio.gather(*(collect(job) for job in jobs)))

    found = asyncio.run(main())
    assert runner.wait_idle(30)
    runner.close()
    alone = [run(engine, prompt, max_tokens=6, ignore_eos=True)[0] for prompt in prompts]
    assert found == [alone, alone[:1]]


def test_generations_take_turns_token_by_token(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    gate = Gate(monkeypatch)
    runner = Runner(engine, 2, 8)

    async def main() -> tuple[Job, ...]:
        jobs = tuple(runner.submit([engine.encode(text)], PARAMS) for text in ("the cat", "a dog", "on the log"))
        gate.open()
        await asyncio.gather(*(collect(job) for job in jobs))
        return jobs

    first, second, third = (job.generations[0] for job in asyncio.run(main()))
    runner.close()
    turns = gate.turns
    assert [len([t for t in turns if t is g]) for g in (first, second, third)] == [6, 6, 6]
    # Only two at once; the third begins when the first has ended, and then takes turns with the second.
    together = turns[1:11]
    assert all(a is not b for a, b in itertools.pairwise(together))
    assert third not in turns[: turns.index(first) + 10]


def test_a_full_queue_refuses_all_prompts_of_a_request(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    gate = Gate(monkeypatch)
    runner = Runner(engine, 1, 2)
    prompt = engine.encode("the")

    async def main() -> None:
        first = runner.submit([prompt], PARAMS)
        gate.wait_for_a_step()
        second = runner.submit([prompt], PARAMS)
        assert (runner.running, runner.waiting) == (1, 1)
        with pytest.raises(QueueFull):
            runner.submit([prompt, prompt], PARAMS)
        assert (runner.running, runner.waiting) == (1, 1)
        third = runner.submit([prompt], PARAMS)
        with pytest.raises(QueueFull):
            runner.submit([prompt], PARAMS)
        gate.open()
        results = await asyncio.gather(*(collect(job) for job in (first, second, third)))
        assert results[0] == results[1] == results[2]

    asyncio.run(main())
    runner.close()


def test_cancelling_frees_the_place_of_running_and_waiting_requests(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    gate = Gate(monkeypatch)
    runner = Runner(engine, 1, 1)
    prompt = engine.encode("the")

    async def main() -> None:
        first = runner.submit([prompt], SamplingParams(max_tokens=900, ignore_eos=True))
        gate.wait_for_a_step()
        second = runner.submit([prompt], PARAMS)
        second.cancel()
        assert runner.waiting == 0
        first.cancel()
        gate.open()
        assert await asyncio.to_thread(runner.wait_idle, 30)
        assert first.generations[0].finished
        assert first.generations[0].completion_tokens == 1
        assert second.generations[0].completion_tokens == 0
        assert len(await collect(runner.submit([prompt], PARAMS))) == 1

    asyncio.run(main())
    runner.close()


def test_a_failing_generation_fails_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    runner = Runner(engine, 2, 2)
    inner = Generation.step

    def step(generation: Generation) -> Step | None:
        if generation.prompt_tokens == 1:
            raise FloatingPointError("broken")
        return inner(generation)

    monkeypatch.setattr(Generation, "step", step)

    async def main() -> None:
        good = runner.submit([engine.encode("the cat sat")], PARAMS)
        bad = runner.submit([[1]], PARAMS)
        with pytest.raises(GenerationFailed, match="broken"):
            await collect(bad)
        assert len((await collect(good))[0]) == 6

    asyncio.run(main())
    assert runner.wait_idle(30)
    assert runner.healthy
    runner.close()


def test_closing_fails_what_is_unfinished_and_refuses_the_rest(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    gate = Gate(monkeypatch)
    runner = Runner(engine, 1, 4)
    prompt = engine.encode("the")

    async def main() -> None:
        jobs = [runner.submit([prompt], PARAMS) for _ in range(3)]
        gate.wait_for_a_step()
        closing = asyncio.get_running_loop().run_in_executor(None, runner.close)
        while runner.healthy:
            await asyncio.sleep(0)
        gate.open()
        for job in jobs:
            with pytest.raises(QueueFull, match="shutting down"):
                await collect(job)
        await closing
        with pytest.raises(QueueFull):
            runner.submit([prompt], PARAMS)

    asyncio.run(main())
    assert not runner.healthy
    assert runner.wait_idle(0)


def test_a_loop_that_has_closed_does_not_stop_the_runner(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    gate = Gate(monkeypatch)
    runner = Runner(engine, 1, 4)

    async def leave() -> None:
        runner.submit([engine.encode("the")], SamplingParams(max_tokens=900, ignore_eos=True))
        gate.wait_for_a_step()

    asyncio.run(leave())
    gate.open()
    assert runner.wait_idle(30)
    assert runner.healthy
    runner.close()
