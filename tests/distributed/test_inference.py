"""The engine over several ranks gives the tokens and the log-probabilities of one process."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.serving import EngineConfig
from fused.mask import CAUSAL
from inference import ranks
from inference.engine import Engine
from inference.generation import Generation
from inference.params import SamplingParams
from inference.ranks import Stripes, cheaper_strategy
from parallel.layout import Layout
from parallel.ring import traffic
from parallel.ring.scene import plain_scene
from parallel.strategies import find_strategy
from tests.helpers.dist import run_distributed
from tests.unit.inference.builders import make_folder

LONG = "the cat sat on the mat. the dog sat on the log. " * 16
SETTINGS = EngineConfig(page_tokens=8, step_tokens=80, kv_tokens=4096)


def work(engine: Engine) -> list[Generation]:
    """Prompts of few tokens and of many chunks, greedy and sampled, one with all positions scored, and an embedding."""
    ways: list[tuple[str, dict[str, Any]]] = [
        (LONG, {"temperature": 0.0, "logprobs": 2, "prompt_logprobs": True}),
        ("a dog", {"temperature": 0.0}),
        (LONG + "a dog", {"seed": 3, "logprobs": 0}),
        (LONG[:-9], {"temperature": 0.0, "repetition_penalty": 1.2}),
    ]
    found = [
        engine.start(engine.encode(text), SamplingParams(max_tokens=20, ignore_eos=True, **way)) for text, way in ways
    ]
    return [*found, engine.start(engine.encode(LONG[40:]), SamplingParams(max_tokens=1), task="embed")]


def results(engine: Engine) -> list[tuple[list[int], list[float]]]:
    """Of every text its tokens and figures; computed twice, the second time from remembered pages."""
    found = []
    for _ in range(2):
        texts = work(engine)
        for text in texts:
            engine.submit(text)
        while engine.busy:
            engine.step()
        for text in texts:
            said = [news.logprob for news in text.news if not isinstance(news, Exception)]
            figures = [entry.value for entry in [*text.prompt_logprobs, *said] if entry is not None]
            found.append((text.tokens, figures if text.embedding is None else text.embedding.tolist()))
    assert engine.pool.used == 0
    return found


def drafting(engine: Engine) -> list[list[int]]:
    """Trees of which each right branch is never the first, so that accepted tokens move, over ranks too."""
    prompt, params = engine.encode(LONG), SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    plain = [step.token for step in engine.stream(prompt, params)]

    def tree(generation: Generation, room: int) -> tuple[list[int], list[int]]:
        done = generation.completion_tokens
        tokens, parents, above = [], [], 0
        for token in plain[done : done + min(room, 3)]:
            tokens += [(token + 1) % engine.spec.vocab_size, token]
            parents += [above, above]
            above = len(tokens)
        return tokens, parents

    engine.scheduler.draft = tree
    before = engine.stats.steps
    found = [step.token for step in engine.stream(prompt, params)]
    assert engine.stats.steps - before < len(found)
    return [plain, found]


def _serve(rank: int, size: int, folder: str, settings: EngineConfig) -> Any:
    if rank > 0:
        ranks.follow({"model": folder, "engine": vars(settings)})
        return None
    engine = Engine(folder, settings)
    found = results(engine), drafting(engine)
    engine.close()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_give_what_one_process_gives(size: int, folder: Path) -> None:
    alone = Engine(folder, SETTINGS)
    expected, drafts = results(alone), drafting(alone)
    found, (plain, drafted) = run_distributed(_serve, size, str(folder), replace(SETTINGS, ranks=size))[0]
    for (tokens, figures), (ours, own) in zip(expected, found, strict=True):
        assert ours == tokens
        torch.testing.assert_close(torch.tensor(own), torch.tensor(figures), atol=1e-4, rtol=0)
    assert plain == drafted == drafts[0]


def test_stripes_are_even_and_place_every_token_once() -> None:
    for page, size in ((8, 2), (24, 3), (4, 4)):
        stripes = Stripes(page, size)
        for start, stop in ((0, 1), (0, 5 * page), (3, 3 * page + 5), (page - 1, page + 1)):
            layout = stripes.layout(start, stop)
            assert sorted(p for rank in range(size) for p in layout.positions(rank)) == list(range(start, stop))
            for rank in range(size):
                held = stripes.layout(0, stop).positions(rank).tolist()
                assert len(held) == stripes.count(stop, rank)
                assert [stripes.place(p, rank) for p in held] == list(range(len(held)))
                assert all(stripes.place(p, rank) is None for p in range(stop) if p not in held)


@pytest.mark.parametrize("past", [0, 256, 512, 1024, 4096, 16384])
def test_the_strategy_that_is_chosen_sends_fewer_bytes(past: int) -> None:
    stripes, widths = Stripes(64, 2), traffic.Widths(1, 64, 64, 4)
    queries, keys = stripes.layout(past, past + 512), stripes.layout(0, past + 512)
    sent = {name: _bytes(name, queries, keys, widths) for name in ("ring", "token_ring")}
    chosen = cheaper_strategy(512, past + 512, 9, 3, 64)
    assert sent[chosen] == min(sent.values())
    if past >= 8192:
        assert 3 * sent["token_ring"] < sent["ring"]


def _bytes(strategy: str, queries: Layout, keys: Layout, widths: traffic.Widths) -> int:
    problem = plain_scene(queries, keys, CAUSAL, 9, 3).problem
    return sum(traffic.link_bytes(find_strategy(strategy).forward(problem), widths).values())
