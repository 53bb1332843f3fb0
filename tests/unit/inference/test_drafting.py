import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conf.errors import ConfigError
from conf.methods import DRAFTERS
from conf.serving import EngineConfig
from inference.drafters.base import Draft, Successors, grow
from inference.drafters.dynamic_tree import DynamicTree
from inference.drafters.ngram import LONGEST, SHORTEST, Lookup, Ngram
from inference.drafters.spectr import acceptance_factor, k_sequential
from inference.drafters.trie import BRANCH, MATCH, Node, Own
from inference.drafting import BUSY, FIRST_LOSS, LOSS, PROBE, Drafter, DraftSize, Record
from inference.engine import Engine
from inference.generation import Generation
from inference.methods import Methods
from inference.params import SamplingParams
from models.hf import load_hf, save_hf
from tests.unit.inference.builders import ids, make_folder
from tests.unit.inference.test_paths import TINY


def slow_continuation(tokens: list[int], most: int) -> list[int]:
    for size in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[-size:]:
                return tokens[end : end + most]
    return []


@pytest.mark.parametrize("seed", range(5))
def test_the_text_goes_on_as_after_the_last_place_that_ended_alike(seed: int):
    generator = random.Random(seed)
    tokens = [generator.randrange(4) for _ in range(3)]
    lookup = Lookup()
    for _ in range(120):
        place = lookup.place(tokens)
        assert ([] if place is None else tokens[place : place + 5]) == slow_continuation(tokens, 5)
        tokens += [generator.randrange(4) for _ in range(generator.randrange(1, 4))]


def test_a_draft_is_as_long_as_pays():
    sure, unsure = [0.9**n for n in range(1, 9)], [0.01**n for n in range(1, 9)]
    flat = DraftSize(dict.fromkeys(range(1, 13), 1.0), 8)
    assert flat.best(sure, 1) == 8
    assert flat.best(unsure, 1) == 0  # not worth its uncertainty even where rows cost nothing
    linear = DraftSize({rows: float(rows) for rows in range(1, 13)}, 8)
    assert linear.best(sure, 1) == 0
    cliff = DraftSize({rows: 1.0 + 0.1 * rows + 10.0 * (rows > 3) for rows in range(1, 13)}, 8)
    assert cliff.best(sure, 1) == 2
    assert cliff.best([0.05], 1) == 0
    assert cliff.best(sure, 3) == 0
    assert flat.best(sure, 1, sec_per_guess=0.3) < 8
    assert flat.best(sure, 1, sec_per_guess=1.0) == 0  # a draft model that is as slow as the model


@pytest.mark.parametrize(("seed", "row"), [(0, 0.2), (1, 0.3), (2, 0.5), (3, 0.1)])
def test_drafts_never_cost_a_text_more_than_a_little(seed: int, row: float, engine: Engine):
    """A source that is right for a while, so that drafts grow, and then wrong for long, again and again."""
    dice, spent, vocab = random.Random(seed), 0.0, engine.spec.vocab_size
    size = DraftSize({rows: 1.0 + row * (rows - 1) for rows in range(1, 12)}, 6)
    drafter = Drafter(size, lambda: 1, vocab, None)
    text = engine.start([1], SamplingParams(max_tokens=900, temperature=0.0, ignore_eos=True))
    text.drafter = "ngram"
    lucky = 0

    class Moody(Ngram):
        def draft(self, generation: Generation, rate: Callable[[int], float], most: int, depth: int) -> Draft:
            return grow(lambda _: [(2 if lucky > 0 else 3, 0, None)], None, rate, most)

    drafter.sources["ngram"] = Moody()
    while text.completion_tokens < 900:
        lucky = dice.randrange(1, 9) if lucky < -dice.randrange(20, 90) else lucky - 1
        tokens, _ = drafter.propose(text, 900 - text.completion_tokens - 1)
        right = len(tokens) if lucky > 0 else 0
        spent += size.costs[1 + len(tokens)]
        if tokens:
            drafter.learn(text, [2, *tokens], range(right + 1), torch.empty(0))
        for _ in range(right + 1):
            text.accept(2)
        worst = size.costs[7] - size.costs[1]  # one draft that was begun within bounds
        assert spent <= text.completion_tokens * (1 + LOSS) + FIRST_LOSS + worst
    assert drafter.drafted > 0


FOLLOWS = {0: [1, 2], 1: [3, 4], 2: [5], 3: [], 4: [], 5: []}


def children(token: int) -> list[tuple[int, int, int]]:
    return [(child, rank, child) for rank, child in enumerate(FOLLOWS[token])]


def test_a_tree_holds_the_likeliest_paths():
    draft = grow(children, 0, Record((0.6, 0.3)).rate, 4)
    assert draft.tokens == [1, 3, 2, 4]
    assert draft.parents == [0, 1, 0, 1]
    assert draft.chances == pytest.approx([0.6, 0.36, 0.3, 0.18])
    assert draft.first(2).tokens == [1, 3]


def test_a_trie_counts_all_continuations_up_to_their_length():
    generator = random.Random(3)
    tokens, own, expected = [], Own(), Node()
    for _ in range(9):
        tokens += [generator.randrange(3) for _ in range(generator.randrange(1, 9))]
        own.update(tokens)
    for start in range(len(tokens)):
        expected.insert(tokens[start : start + BRANCH + MATCH])

    def same(one: Node, other: Node) -> bool:
        return one.count == other.count and one.keys() == other.keys() and all(same(one[t], other[t]) for t in one)

    assert same(own.root, expected)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("seed", range(2))
def test_spectr_keeps_the_distribution(count: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    target, draft = (torch.rand(6, generator=generator, dtype=torch.float64) ** 3 for _ in range(2))
    target[seed] = 0.0
    target, draft = target / target.sum(), draft / draft.sum()
    trials = 1500
    drawn = torch.multinomial(draft, trials * count, True, generator=generator).view(trials, count).tolist()
    draws = torch.rand(trials, count + 1, generator=generator, dtype=torch.float64).tolist()
    found = torch.zeros(6, dtype=torch.float64)
    accepted = 0
    for tokens, numbers in zip(drawn, draws, strict=True):
        token = k_sequential(target, draft, tokens, numbers)
        found[token] += 1
        accepted += token in tokens
    expected = target * trials
    assert found[seed] == 0
    kept = expected > 0
    statistic = float(((found - expected)[kept] ** 2 / expected[kept]).sum())
    assert statistic < 20.5  # chi-square, 5 degrees of freedom at most, 0.1 %
    beta = float(torch.minimum(target, draft).sum())
    assert accepted / trials > beta - 0.05  # never worse than one draft


def test_spectr_of_one_draft_is_speculative_sampling():
    target, draft = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.2, 0.6]).double()
    assert acceptance_factor(target, draft, 1) == 1.0
    assert k_sequential(target, draft, [2], [0.33, 0.0]) == 2  # accepted with 0.2 / 0.6
    assert k_sequential(target, draft, [2], [0.34, 0.7]) == 0  # the rest is 0.3 and 0.1
    assert k_sequential(target, draft, [2], [0.34, 0.8]) == 1


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("draft") / "tiny", seed=1)


def free_rows(engine: Engine) -> Engine:
    assert engine.drafter is not None
    engine.drafter.size.costs = dict.fromkeys(range(1, 20), 1000000.0)  # beside which a draft model costs nothing
    return engine


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_no_drafter_changes_a_greedy_text_and_all_leave_nothing_behind(
    drafter: str, model_folder: Path, other_folder: Path, engine: Engine
):
    own = free_rows(Engine(model_folder, replace(TINY, draft_tokens=4, draft_model=str(other_folder))))
    assert own.drafter is not None
    asked = SamplingParams(max_tokens=70, temperature=0.0, ignore_eos=True, methods=Methods(drafter=drafter))
    for text in ("the cat sat on the mat. the cat", "a dog"):
        prompt = engine.encode(text)
        assert ids(own, prompt, asked) == ids(engine, prompt, replace(asked, methods=Methods()))
    assert own.stats.drafted_tokens > 0
    source = own.drafter.sources[drafter]
    if isinstance(source, DynamicTree):
        assert source.model.pool.used == 0


def test_sampled_texts_have_the_same_distribution_with_spectr(model_folder: Path, tmp_path: Path):
    model = load_hf(model_folder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    near = save_hf(model, tmp_path / "near", model_folder)
    engine = free_rows(Engine(model_folder, replace(TINY, draft_tokens=4, draft_model=str(near))))
    prompt = engine.encode("the cat")
    counts: dict[str, dict[tuple[int, ...], int]] = {"spectr": {}, "none": {}}
    for drafter, found in counts.items():
        for seed in range(150):
            methods = Methods(drafter=drafter)
            params = SamplingParams(max_tokens=3, top_k=2, seed=seed, ignore_eos=True, temperature=3.0, methods=methods)
            output = tuple(ids(engine, prompt, params))
            found[output] = found.get(output, 0) + 1
    assert engine.stats.drafted_tokens > engine.stats.drafted_right > 10
    assert len(counts["none"]) == 8
    statistic = sum(
        (counts["spectr"].get(output, 0) - number) ** 2 / (counts["spectr"].get(output, 0) + number)
        for output, number in counts["none"].items()
    )
    assert counts["spectr"].keys() <= counts["none"].keys()
    assert statistic < 24.3  # chi-square of two samples, 7 degrees of freedom, 0.1 %


def test_nothing_is_drafted_under_load_and_seldom_where_it_never_pays(model_folder: Path):
    engine = free_rows(Engine(model_folder, replace(TINY, draft_tokens=4)))
    assert engine.drafter is not None
    for index in range(BUSY):
        prompt = engine.encode("the cat sat on the mat. " * 3 + "a" * index)
        engine.submit(engine.start(prompt, SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)))
    while len(engine.scheduler.running) < BUSY or any(g.prefilling for g in engine.scheduler.running):
        engine.step()
    before = engine.stats.drafted_tokens
    while len(engine.scheduler.running) == BUSY:
        engine.step()
        if len(engine.scheduler.running) == BUSY:
            assert engine.stats.drafted_tokens == before
    while engine.busy:
        engine.step()
    engine.drafter.size.costs = {rows: float(rows) for rows in range(1, 20)}
    before = engine.stats.drafted_tokens
    prompt = engine.encode("the cat sat on the mat. " * 3)
    ids(engine, prompt, SamplingParams(max_tokens=3 * PROBE, temperature=0.0, ignore_eos=True))
    assert engine.stats.drafted_tokens - before <= 3


def test_what_a_tenant_said_drafts_for_no_other(model_folder: Path):
    engine = free_rows(Engine(model_folder, replace(TINY, draft_tokens=4)))
    assert engine.drafter is not None
    for drafter in ("token_recycling", "trie"):
        source = engine.drafter.sources[drafter]
        assert isinstance(source, Successors)
        params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True, methods=Methods(drafter=drafter))
        first = engine.start(engine.encode("the cat sat"), params, b"one")
        engine.submit(first)
        while engine.busy:
            engine.step()
        for salt, known in ((b"one", True), (b"two", False)):
            again = engine.start(engine.encode("the cat sat"), params, salt)
            again.tokens += first.tokens[again.prompt_tokens :][:4]
            state = source.root(again)
            assert bool(state is not None and source.children(state)) == known, (drafter, salt)


def test_drafters_that_the_engine_lacks_are_refused(model_folder: Path, engine: Engine):
    with pytest.raises(ConfigError, match="draft_tokens"):
        engine.start([1], SamplingParams(methods=Methods(drafter="trie")))
    with pytest.raises(ConfigError, match="draft model"):
        Engine(model_folder, EngineConfig(draft_tokens=2, drafter="spectr"))
    with pytest.raises(ConfigError, match="drafter"):
        Methods(drafter="guess")
