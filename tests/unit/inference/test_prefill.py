"""Prefill strategies: every one joins the tests over ``PREFILLS``; each has an oracle of its own."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conf.errors import ConfigError
from conf.methods import PREFILLS as NAMES
from conf.serving import EngineConfig
from inference.engine import Engine
from inference.generation import Generation
from inference.methods import Methods
from inference.model_runner import ModelRunner
from inference.pace import Pace
from inference.paged_attention import StepAttention
from inference.params import SamplingParams
from inference.prefill import PREFILLS, Surroundings
from inference.prefill.cache_blend import ASKED
from inference.prefill.lazy_llm import LazyLLM
from inference.prefill.minference import BLOCK, _Sparse
from inference.scheduler import Span
from models.decoder import Decoder
from models.hf import load_hf
from models.rope import rotation
from tests.unit.inference.builders import ids, make_folder

SMALL = EngineConfig(page_tokens=4, pack=False, step_tokens=200)
WORDS = random.Random(0)
A, B, C = ([WORDS.randrange(1, 280) for _ in range(count)] for count in (83, 81, 14))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("deep") / "model", layers=6)


@pytest.fixture
def fresh(folder: Path) -> Engine:
    """An engine whose cache has read A and B, each alone."""
    engine = Engine(folder, SMALL)
    for prompt in (A, B):
        ids(engine, prompt, plain(2))
    return engine


def plain(tokens: int = 12) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)


def asks(prefill: str, budget: float, tokens: int = 12) -> SamplingParams:
    return replace(plain(tokens), methods=Methods(prefill=prefill, prefill_budget=budget))


def all_at_once(engine: Engine, texts: list[Generation]) -> list[list[int]]:
    for text in texts:
        engine.submit(text)
    while engine.busy:
        engine.step()
    assert engine.pool.used == 0
    return [text.tokens[text.prompt_tokens :] for text in texts]


def rows_of_layers(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> dict[int, list[int]]:
    """The slots that each layer writes from now on."""
    written: dict[int, list[int]] = {layer: [] for layer in range(engine.spec.layers)}
    runner = engine.runner
    assert isinstance(runner, ModelRunner)

    def recorded(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def compute(index: int, x_TE: Tensor, step: Any) -> Tensor:
            written[index] += step.slots_T.tolist()
            return layer(index, x_TE, step)

        return compute

    monkeypatch.setattr(runner, "_layers", [recorded(layer) for layer in runner._layers])
    return written


def test_the_registry_is_what_the_schema_offers():
    assert ("full", *PREFILLS) == NAMES


@pytest.mark.parametrize("chunk", [200, 23])
@pytest.mark.parametrize("prefill", PREFILLS)
def test_a_whole_budget_is_plain_computing(prefill: str, chunk: int, fresh: Engine, folder: Path):
    prompts = [A + B + C, C + B + B, C]
    expected = [ids(Engine(folder, replace(SMALL, prefix_cache=False)), prompt, plain()) for prompt in prompts]
    fresh.scheduler.step_tokens, fresh.scheduler.pace = chunk, Pace(chunk, 0.0)
    before = fresh.pool.remembered
    texts = [fresh.start(prompt, asks(prefill, 1.0)) for prompt in prompts]
    assert all_at_once(fresh, texts) == expected
    assert all(text.cached_tokens == 0 for text in texts)
    assert fresh.pool.remembered == before  # nothing of a lossy text reaches others


@pytest.mark.parametrize("prefill", PREFILLS)
def test_lossy_and_plain_texts_run_side_by_side_and_after_preemption(prefill: str, folder: Path):
    engine = Engine(folder, replace(SMALL, kv_tokens=900, step_tokens=50))
    prompt = A + B + C
    expected = ids(engine, prompt, plain())
    texts = [engine.start(prompt, asks(prefill, 0.2)) for _ in range(3)]
    texts.insert(1, engine.start(prompt, plain()))
    found = all_at_once(engine, texts)
    assert found[1] == expected
    assert texts[0].lossy == (f"prefill={prefill}:0.2",)
    assert found[0] == ids(engine, prompt, asks(prefill, 0.2))
    small = Engine(folder, replace(SMALL, kv_tokens=400, step_tokens=50))
    small_texts = [small.start(prompt, asks(prefill, 0.2, 60)) for _ in range(2)]
    assert [len(tokens) for tokens in all_at_once(small, small_texts)] == [60, 60]
    assert small.stats.preemptions > 0


def test_what_does_not_go_together_is_refused(folder: Path):
    engine = Engine(folder, SMALL)
    for methods in (Methods(prefill="lazy_llm", kv_policy="h2o"), Methods(prefill="minference", decode_layers=2)):
        with pytest.raises(ConfigError, match="prefill"):
            engine.start([1, 2], SamplingParams(methods=methods))
    scored = replace(asks("lazy_llm", 0.5), prompt_logprobs=True)
    with pytest.raises(ConfigError, match="log-probabilities"):
        engine.start([1, 2], scored)
    with pytest.raises(ConfigError, match="prefix_cache"):
        Engine(folder, replace(SMALL, prefix_cache=False)).start([1, 2], asks("cache_blend", 0.5))
    with pytest.raises(ConfigError, match="prefill"):
        Methods(prefill="lazy")


def first_logits(engine: Engine, prompt: list[int], params: SamplingParams, salt: bytes = b"") -> Tensor:
    """Logits of the first token."""
    text = engine.start(prompt, replace(params, max_tokens=1), salt)
    engine.submit(text)
    while True:
        spans = engine.scheduler.plan()
        logits = engine.runner.run(spans, engine.cache).logits[0]
        engine.scheduler.commit(text, spans[0].start + spans[0].count)
        if logits is not None:
            engine.cancel(text)
            return logits[-1]


def test_blending_takes_cached_text_wherever_it_stood(fresh: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch):
    start, prompt, count = C, C + B, len(B)
    alone = Span(fresh.start(B, plain()), 0, B)
    for page in range(-(-count // 4)):
        alone.generation.add_page(100 + page)
    shifted, own = list(range(len(start), len(prompt))), [400 + at for at in range(count)]
    assert isinstance(fresh.runner, ModelRunner)
    fresh.runner.forward(alone.tokens, shifted, own, StepAttention(fresh.cache, [alone], torch.float32), fresh.cache)
    text = fresh.start(prompt, asks("cache_blend", 0.1))
    fresh.submit(text)
    spans, written = fresh.scheduler.plan(), rows_of_layers(fresh, monkeypatch)
    places = spans[0].generation.slots(0, len(prompt), 4)
    fresh.runner.run(spans, fresh.cache)
    assert sorted(written[0]) == sorted(written[1]) == sorted(places)
    going = {places.index(slot) for slot in written[2]}
    whole = count // 4 * 4  # the last tokens of a text fill no page
    reused = set(range(len(start), len(start) + whole))
    asked = set(range(len(prompt) - ASKED, len(prompt)))
    assert set(range(len(start))) <= going
    assert len(going & reused - asked) <= math.ceil(0.1 * whole) < len(reused - asked)
    left = sorted(reused - going)
    for layer in range(2, 6):
        held = fresh.cache.store[layer][:, torch.tensor(places)[left]]
        expected = fresh.cache.store[layer][:, torch.tensor(own)[[at - len(start) for at in left]]]
        torch.testing.assert_close(held, expected, atol=1e-5, rtol=1e-4)


def test_blending_comes_nearer_the_more_it_computes_and_leaves_other_tenants_alone(fresh: Engine, folder: Path):
    prompt = A + B + C
    whole = first_logits(Engine(folder, replace(SMALL, prefix_cache=False)), prompt, plain())
    errors = [
        float((first_logits(fresh, prompt, asks("cache_blend", budget)) - whole).norm())
        for budget in (0.01, 0.2, 0.35, 1.0)  # of A nothing differs: B is a half
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0.0 < errors[-2]
    other = first_logits(fresh, prompt, asks("cache_blend", 0.01), b"another tenant")
    assert torch.equal(other, whole)


def lazy_oracle(model: Decoder, prompt: list[int], tokens: int, strategy: LazyLLM) -> list[int]:
    """Greedy tokens of LazyLLM, row by row, over dictionaries of what each layer has of each place."""
    spec, group = model.spec, model.spec.heads // model.spec.kv_heads
    blocks: list[Any] = list(model.layers)
    keys: list[dict[int, Tensor]] = [{} for _ in range(spec.layers)]
    values: list[dict[int, Tensor]] = [{} for _ in range(spec.layers)]
    waiting: dict[int, dict[int, Tensor]] = {border: {} for border in strategy.borders}

    def turned(x: Tensor, place: int) -> Tensor:
        turn = rotation(torch.tensor([[place]]), spec.head_dim, spec.rope)
        return turn.apply(x.view(1, 1, -1, spec.head_dim))[0, 0]

    def through(rows: dict[int, Tensor], active: list[int]) -> Tensor:
        last, most = max(rows), len(active)
        weights: dict[int, float] = {}
        for layer, block in enumerate(blocks):
            if layer in strategy.borders:
                waiting[layer] |= {place: x for place, x in rows.items() if place != last}
                young = [place for place in active if place != last]
                count = min(len(young), math.ceil(strategy.share(layer) * most))
                chosen = sorted(sorted(young, key=lambda place: -weights[place])[:count])
                rows = {p: waiting[layer][p] for p in chosen if p not in keys[layer]} | {last: rows[last]}
                active = [*chosen, last]
            attention, normed = block.attention, {p: block.attention_norm(x) for p, x in rows.items()}
            for place, x in normed.items():
                assert place not in keys[layer], "no layer computes a token twice"
                keys[layer][place] = turned(attention.k(x), place)
                values[layer][place] = attention.v(x).view(-1, spec.head_dim)
            weights = dict.fromkeys(active, 0.0)
            for place, x in normed.items():
                seen, out = [other for other in active if other <= place], []
                for head, query in enumerate(turned(attention.q(x), place)):
                    logits = torch.stack([query @ keys[layer][p][head // group] for p in seen]) * spec.head_dim**-0.5
                    share = logits.softmax(0)
                    out.append(share @ torch.stack([values[layer][p][head // group] for p in seen]))
                    if place == last:
                        weights = {p: weights[p] + float(w) for p, w in zip(seen, share, strict=True)}
                x = rows[place] + attention.out(torch.cat(out))
                rows[place] = x + block.mlp(block.mlp_norm(x))
        return model.head(model.norm(rows[last]))

    found: list[int] = []
    with torch.no_grad():
        logits = through({p: model.embed.weight[token] for p, token in enumerate(prompt)}, list(range(len(prompt))))
        for place in range(len(prompt), len(prompt) + tokens):
            found.append(int(logits.argmax()))
            logits = through({place: model.embed.weight[found[-1]]}, list(range(place + 1)))
    return found


def test_lazy_prompts_are_what_the_oracle_computes_row_by_row(folder: Path, monkeypatch: pytest.MonkeyPatch):
    engine, model = Engine(folder, SMALL), load_hf(folder).eval()
    prompt = A
    strategy = LazyLLM(Surroundings(6, torch.empty(0), engine.pool), 0.3, len(prompt))
    assert strategy.borders == [2, 3, 4]
    written = rows_of_layers(engine, monkeypatch)
    assert ids(engine, prompt, asks("lazy_llm", 0.3, 8)) == lazy_oracle(model, prompt, 8, strategy)
    assert all(len(set(slots)) == len(slots) for slots in written.values())  # none twice
    assert len(written[0]) == len(prompt) + 7 >= len(written[5]) > math.ceil(0.3 * len(prompt)) + 8  # some came back


def test_of_a_lazy_prompt_the_last_layers_compute_the_budget(folder: Path, monkeypatch: pytest.MonkeyPatch):
    engine = Engine(folder, SMALL)
    written = rows_of_layers(engine, monkeypatch)
    ids(engine, A, asks("lazy_llm", 0.3, 1))
    shares = [1, 1, 1 - 0.7 / 3, 1 - 1.4 / 3, 0.3, 0.3]
    for (layer, slots), share in zip(written.items(), shares, strict=True):
        assert len(slots) == min(83, math.ceil(share * 83) + 1), layer


def sparse_scene(rows: int, blocks: int, budget: float) -> tuple[_Sparse, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    sparse = object.__new__(_Sparse)
    sparse._blocks, sparse._count = blocks, max(2, math.ceil(budget * blocks))
    queries = torch.randn(rows, 2, 3, 8, generator=generator)
    keys, values = (torch.randn(2, blocks * BLOCK + 9, 8, generator=generator) for _ in range(2))
    sparse._past, sparse._mask = [[(keys, values)]], None
    return sparse, queries, keys, values


def test_sparse_rows_read_the_blocks_that_were_chosen_for_them():
    sparse, queries, keys, values = sparse_scene(150, 20, 0.3)
    chosen = sparse.choose(queries, keys[:, : 20 * BLOCK])
    assert chosen.shape == (2, 3, 6)
    parts = sparse.over_past(0, queries)
    lse = torch.stack([lse for _, lse in parts]).logsumexp(0)
    out = torch.stack([part * (own - lse).exp() for part, own in parts]).sum(0)
    for head in range(2):
        for row in range(150):
            blocks = chosen[head, row // BLOCK].tolist()
            assert len(set(blocks)) == 6
            assert {0, 19} <= set(blocks)
            seen = [t for block in blocks for t in range(block * BLOCK, (block + 1) * BLOCK)] + list(range(1280, 1289))
            shares = (queries[row, head] @ keys[head, seen].T / 8**0.5).softmax(1)
            torch.testing.assert_close(out[head, :, row], shares @ values[head, seen], atol=1e-5, rtol=1e-4)


def test_vertical_and_slash_blocks_are_those_of_the_last_rows_attention():
    sparse, queries, keys, _ = sparse_scene(128, 12, 0.5)
    keys = keys[:, : 12 * BLOCK]
    logits = torch.einsum("ekgd,ktd->kget", queries[-64:], keys) / 8**0.5
    attention = logits.softmax(3).sum(1)
    chosen = sparse._vertical_slash(attention.sum(1).unflatten(1, (-1, BLOCK)).sum(2), attention, 128)
    for head in range(2):
        mass = [float(attention[head, :, block * BLOCK : (block + 1) * BLOCK].sum()) for block in range(12)]
        upright = {0, 11, *sorted(range(1, 11), key=lambda block: -mass[block])[:2]}
        by_distance = [0.0] * (12 * BLOCK + 128)
        for row in range(64):
            for token in range(12 * BLOCK):
                by_distance[12 * BLOCK + 64 + row - token] += float(attention[head, row, token])
        for part in range(2):
            slash = {}
            for block in set(range(12)) - upright:
                apart = 12 * BLOCK + part * BLOCK - block * BLOCK
                slash[block] = sum(by_distance[max(0, apart - BLOCK + 1) : apart + BLOCK])
            expected = upright | set(sorted(slash, key=lambda block: -slash[block])[:2])
            assert set(chosen[head, part].tolist()) == expected
