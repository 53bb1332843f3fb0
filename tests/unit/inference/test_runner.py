import asyncio
from pathlib import Path
from typing import Any

import pytest

from conf.errors import DataError
from inference.engine import Engine
from inference.generation import Generation, Logprob
from inference.model_runner import ModelRunner
from inference.params import SamplingParams
from inference.runner import GenerationFailed, Job, QueueFull, Runner
from tests.unit.inference.builders import Gate, run


@pytest.fixture
def engine(model_folder: Path) -> Engine:
    """One of its own: its limits are changed."""
    return Engine(model_folder)


def runner_of(engine: Engine, running: int, queue: int, tokens: int = 10_000) -> Runner:
    engine.scheduler.max_running = running
    return Runner(engine, queue, tokens)


def submit(runner: Runner, prompts: list[list[int]], params: SamplingParams) -> Job:
    return runner.submit(runner.prepare(prompts, params))


PARAMS = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


async def collect(job: Job) -> list[list[int]]:
    tokens: list[list[int]] = [[] for _ in job.generations]
    async for index, step in job:
        tokens[index].append(step.token)
    return tokens


def test_results_equal_those_of_the_engine(engine: Engine):
    prompts = [engine.encode(text) for text in ("the cat", "a dog sat", "on")]
    runner = runner_of(engine, 2, 8)

    async def main() -> list[list[list[int]]]:
        jobs = [submit(runner, prompts, PARAMS), submit(runner, prompts[:1], PARAMS)]
        return list(await asyncio.gather(*(collect(job) for job in jobs)))

    found = asyncio.run(main())
    assert runner.wait_idle(30)
    runner.close()
    alone = [run(engine, prompt, max_tokens=6, ignore_eos=True)[0] for prompt in prompts]
    assert found == [alone, alone[:1]]


def test_texts_share_steps_and_the_next_one_starts_when_one_ends(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    gate = Gate(monkeypatch)
    runner = runner_of(engine, 2, 8)

    async def main() -> tuple[Job, ...]:
        jobs = tuple(submit(runner, [engine.encode(text)], PARAMS) for text in ("the cat", "a dog", "on the log"))
        gate.open()
        await asyncio.gather(*(collect(job) for job in jobs))
        return jobs

    first, second, third = (job.generations[0] for job in asyncio.run(main()))
    runner.close()
    both = [turn for turn in gate.turns if turn == [first, second]]
    assert len(both) >= 5  # unless a step began between their arrivals
    assert [third] == gate.turns[-1]
    assert all(third not in turn for turn in gate.turns if first in turn and not first.finished)


def test_a_full_queue_refuses_all_prompts_of_a_request(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    gate = Gate(monkeypatch)
    runner = runner_of(engine, 1, 2)
    prompt = engine.encode("the")

    async def main() -> None:
        first = submit(runner, [prompt], PARAMS)
        gate.wait_for_a_step()
        second = submit(runner, [prompt], PARAMS)
        assert runner.unfinished == 2
        with pytest.raises(QueueFull):
            submit(runner, [prompt, prompt], PARAMS)
        assert runner.unfinished == 2
        third = submit(runner, [prompt], PARAMS)
        with pytest.raises(QueueFull):
            submit(runner, [prompt], PARAMS)
        gate.open()
        results = await asyncio.gather(*(collect(job) for job in (first, second, third)))
        assert results[0] == results[1] == results[2]

    asyncio.run(main())
    runner.close()


def test_cancelling_frees_the_place_of_running_and_waiting_requests(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    gate = Gate(monkeypatch)
    runner = runner_of(engine, 1, 1)
    prompt = engine.encode("the")

    async def main() -> None:
        first = submit(runner, [prompt], SamplingParams(max_tokens=900, ignore_eos=True))
        gate.wait_for_a_step()
        second = submit(runner, [prompt], PARAMS)
        second.cancel()
        assert runner.unfinished == 1
        first.cancel()
        gate.open()
        assert await asyncio.to_thread(runner.wait_idle, 30)
        assert first.generations[0].finished
        assert first.generations[0].completion_tokens <= 1
        assert engine.pool.used == 0
        assert second.generations[0].completion_tokens == 0
        assert len(await collect(submit(runner, [prompt], PARAMS))) == 1

    asyncio.run(main())
    runner.close()


def test_a_failing_text_fails_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    runner = runner_of(engine, 2, 2)
    inner = Generation.accept

    def accept(generation: Generation, token: int, logprob: Logprob | None = None) -> None:
        if generation.prompt_tokens == 1:
            raise DataError("model", "", "broken", "")
        inner(generation, token, logprob)

    monkeypatch.setattr(Generation, "accept", accept)

    async def main() -> None:
        good = submit(runner, [engine.encode("the cat sat")], PARAMS)
        bad = submit(runner, [[1]], PARAMS)
        with pytest.raises(GenerationFailed, match="broken"):
            await collect(bad)
        assert len((await collect(good))[0]) == 6

    asyncio.run(main())
    assert runner.wait_idle(30)
    assert runner.healthy
    assert engine.pool.used == 0
    runner.close()


def test_a_failing_step_fails_what_runs_and_the_runner_goes_on(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    runner = runner_of(engine, 2, 2)
    inner, failures = ModelRunner.run, [FloatingPointError("broken")]

    def run(self: ModelRunner, *arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return inner(self, *arguments)

    monkeypatch.setattr(ModelRunner, "run", run)

    async def main() -> None:
        with pytest.raises(GenerationFailed):
            await collect(submit(runner, [engine.encode("the")], PARAMS))
        assert len((await collect(submit(runner, [engine.encode("the")], PARAMS)))[0]) == 6

    asyncio.run(main())
    assert runner.wait_idle(30)
    assert engine.pool.used == 0
    runner.close()


def test_a_queue_bounded_by_tokens(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    gate = Gate(monkeypatch)
    runner = runner_of(engine, 1, 8, tokens=50)

    async def main() -> None:
        long = submit(runner, [[1] * 200], PARAMS)  # nothing waits: a prompt of any length is let in
        with pytest.raises(QueueFull) as full:
            submit(runner, [[1] * 10], PARAMS)
        assert full.value.retry_sec >= 1
        gate.open()
        await collect(long)
        await collect(submit(runner, [[1] * 10], PARAMS))

    asyncio.run(main())
    runner.close()


def test_closing_fails_what_is_unfinished_and_refuses_the_rest(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    gate = Gate(monkeypatch)
    runner = runner_of(engine, 1, 4)
    prompt = engine.encode("the")

    async def main() -> None:
        jobs = [submit(runner, [prompt], PARAMS) for _ in range(3)]
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
            submit(runner, [prompt], PARAMS)

    asyncio.run(main())
    assert not runner.healthy
    assert runner.wait_idle(0)


def test_a_loop_that_has_closed_does_not_stop_the_runner(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    gate = Gate(monkeypatch)
    runner = runner_of(engine, 1, 4)

    async def leave() -> None:
        submit(runner, [engine.encode("the")], SamplingParams(max_tokens=900, ignore_eos=True))
        gate.wait_for_a_step()

    asyncio.run(leave())
    gate.open()
    assert runner.wait_idle(30)
    assert runner.healthy
    runner.close()
