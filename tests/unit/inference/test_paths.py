"""Every way of computing a text gives the same tokens: one row of ``PATHS`` is one way."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.methods import DRAFTERS
from conf.serving import EngineConfig
from inference import model_runner, paged_attention
from inference.engine import Engine
from inference.generation import Generation
from inference.params import SamplingParams
from models.hf import load_hf
from models.spec import ExpertSpec
from tests.unit.inference.builders import ids, make_folder

Requests = list[tuple[list[int], SamplingParams]]
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
TINY = EngineConfig(page_tokens=4, prefix_cache=False, pack=False)


def requests(engine: Engine) -> Requests:
    """Prompts of very different lengths, greedy and sampled in several ways; two share their beginning."""
    texts = [
        "the cat sat",
        "a dog",
        "on the log" * 9,
        "the cat sat on the mat. " * 4,
        "the cat sat on the mat. " * 3 + "a",
    ]
    ways: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 0.8, "top_k": 20, "min_p": 0.01},
        {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.2, "presence_penalty": 0.1},
        {"temperature": 1.2, "logit_bias": {5: 3.0}},
    ]
    return [
        (engine.encode(text), SamplingParams(max_tokens=24 + 3 * index, seed=index, ignore_eos=True, **way))
        for index, (text, way) in enumerate(zip(texts, ways, strict=True))
    ]


def together(engine: Engine, work: Requests) -> list[list[int]]:
    """All at once; afterwards no page is in use."""
    generations = [engine.start(*request) for request in work]
    for generation in generations:
        engine.submit(generation)
    while engine.busy:
        engine.step()
    assert engine.pool.used == 0
    return [generation.tokens[generation.prompt_tokens :] for generation in generations]


def preempted(engine: Engine, work: Requests) -> list[list[int]]:
    """In a cache that holds the longest of them and little more."""
    found = together(engine, work)
    assert engine.stats.preemptions > 0
    return found


def warm(engine: Engine, work: Requests) -> list[list[int]]:
    """For the second time, from remembered pages."""
    first = together(engine, work)
    before = engine.stats.prefix_hit_tokens
    assert together(engine, work) == first
    assert engine.stats.prefix_hit_tokens - before >= sum((len(prompt) - 1) // 4 * 4 for prompt, _ in work)
    return first


def staggered(engine: Engine, work: Requests) -> list[list[int]]:
    """Each joins while the ones before it are in the middle; one of them is cancelled and comes again."""
    generations = [engine.start(*request) for request in work]
    cancelled = engine.start(*work[0])
    engine.submit(cancelled)
    for generation in generations:
        for _ in range(3):
            engine.step()
        engine.submit(generation)
    engine.cancel(cancelled)
    while engine.busy:
        engine.step()
    assert engine.pool.used == 0
    return [generation.tokens[generation.prompt_tokens :] for generation in generations]


def drafted(engine: Engine, work: Requests) -> list[list[int]]:
    """One after another with drafts of a fixed size, right and wrong ones."""
    assert engine.drafter is not None
    engine.drafter.size.costs = dict.fromkeys(range(1, 20), 1.0)
    found = [ids(engine, prompt, params) for prompt, params in work]
    assert engine.stats.drafted_tokens > engine.stats.drafted_right > 0
    assert engine.stats.steps < sum(map(len, found))
    assert engine.pool.used == 0
    return found


def drafted_trees(engine: Engine, work: Requests) -> list[list[int]]:
    """Together, with trees whose right branch, where there is one, is never the first."""
    known = [ids(engine, prompt, params) for prompt, params in work]
    outputs = {tuple(prompt): found for (prompt, _), found in zip(work, known, strict=True)}

    def tree(generation: Generation, room: int) -> tuple[list[int], list[int]]:
        done = generation.completion_tokens
        ahead = outputs[tuple(generation.tokens[: generation.prompt_tokens])][done : done + min(room, done % 4)]
        tokens, parents, above = [], [], 0
        for token in ahead:
            tokens += [(token + 1) % engine.spec.vocab_size, token]
            parents += [above, above]
            above = len(tokens)
        return tokens, parents

    engine.scheduler.draft = tree
    before = engine.stats.steps
    found = together(engine, work)
    assert engine.stats.steps - before < max(map(len, found))
    return found


def by_operators(engine: Engine, work: Requests) -> list[list[int]]:
    """As many rows are computed: without compiled loops."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_runner, "FEW_ROWS", 0)
        patch.setattr(paged_attention, "FEW_ROWS", 0)
        return together(engine, work)


def texts_too_long(engine: Engine, work: Requests) -> list[list[int]]:
    """Compiled loops for the shorter texts, beside the others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged_attention, "SHORT", 50)
        return together(engine, work)


Path_ = tuple[EngineConfig, Callable[[Engine, Requests], list[list[int]]]]
PATHS: dict[str, Path_] = {
    "batched": (TINY, together),
    "operators for few rows": (TINY, by_operators),
    "loops beside operators": (TINY, texts_too_long),
    "packed weights": (replace(TINY, pack=True), together),
    "chunks of 7": (replace(TINY, step_tokens=7, mixed_tokens=3, mixed_slowdown=0.0), together),
    "rows one by one": (replace(TINY, step_tokens=1), together),
    "preempted": (replace(TINY, kv_tokens=152), preempted),
    "prefix cache": (replace(TINY, prefix_cache=True), warm),
    "prefix cache and preemption": (replace(TINY, prefix_cache=True, kv_tokens=152), preempted),
    "staggered": (replace(TINY, step_tokens=16), staggered),
    **{f"drafts by {name}": (replace(TINY, draft_tokens=5, drafter=name), drafted) for name in DRAFTERS[:-1]},
    "draft trees": (replace(TINY, prefix_cache=True), drafted_trees),
    "scattered pages": (replace(TINY, page_tokens=1, kv_tokens=400), together),
}


@pytest.fixture(scope="module")
def alone(model_folder: Path) -> tuple[Requests, list[list[int]]]:
    engine = Engine(model_folder, TINY)
    work = requests(engine)
    return work, [ids(engine, prompt, params) for prompt, params in work]


@pytest.mark.parametrize("path", PATHS)
def test_all_paths_give_the_same_tokens(path: str, model_folder: Path, alone: tuple[Requests, Sequence[list[int]]]):
    settings, way = PATHS[path]
    if settings.drafter == "dynamic_tree":
        settings = replace(settings, draft_model=str(model_folder))
    work, expected = alone
    assert way(Engine(model_folder, settings), work) == expected


def test_texts_of_one_prompt_compute_it_once(engine: Engine, model_folder: Path):
    prompt = engine.encode("the cat sat on the mat. " * 8)
    params = SamplingParams(max_tokens=10, seed=3, ignore_eos=True)
    own = Engine(model_folder, EngineConfig(page_tokens=4))
    generations = own.start_many(prompt, params, 4)
    for generation in generations:
        own.submit(generation)
    while own.busy:
        own.step()
    assert own.stats.prompt_tokens < len(prompt) + 4 * 4
    found = [generation.tokens[len(prompt) :] for generation in generations]
    assert found == [ids(engine, prompt, replace(params, seed=seed)) for seed in (3, 4, 5, 6)]


def test_texts_of_other_tenants_share_nothing(model_folder: Path):
    engine = Engine(model_folder, EngineConfig(page_tokens=4))
    prompt = engine.encode("the cat sat on the mat. " * 4)
    hits = []
    for salt in (b"one", b"one", b"two", b""):
        before = engine.stats.prefix_hit_tokens
        engine.submit(engine.start(prompt, SamplingParams(max_tokens=2), salt))
        while engine.busy:
            engine.step()
        hits.append(engine.stats.prefix_hit_tokens - before)
    assert hits == [0, (len(prompt) - 1) // 4 * 4, 0, 0]


SHAPES: dict[str, dict[str, Any]] = {
    "norm behind": {"norm": "post"},
    "biases": {"qkv_bias": True},
    "norms of heads": {"qk_norm": True},
    "experts": {"experts": ExpertSpec(groups=(3,), active=1.5)},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_other_decoders_give_what_their_own_forward_gives(shape: str, tmp_path: Path):
    folder = make_folder(tmp_path / "model", **SHAPES[shape])
    model = load_hf(folder).eval()
    engine = Engine(folder, replace(TINY, step_tokens=16))
    generations = [engine.start(engine.encode(text), GREEDY) for text in ("the cat sat on the mat " * 3, "a dog")]
    for generation in generations:
        engine.submit(generation)
    while engine.busy:
        engine.step()
    for generation in generations:
        tokens = torch.tensor([generation.tokens])
        logits = model(tokens, torch.arange(tokens.shape[1])[None])
        assert isinstance(logits, torch.Tensor)
        expected = logits[0, generation.prompt_tokens - 1 : -1].argmax(-1)
        assert generation.tokens[generation.prompt_tokens :] == expected.tolist()
