"""Every inference method joins here: what holds for all of a kind is said once, over their registry."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import needle_model
from conf.errors import ConfigError
from conf.methods import KV_POLICIES
from conf.serving import EngineConfig
from inference.engine import Engine
from inference.evaluation.needles import haystack
from inference.methods import Methods
from inference.params import SamplingParams
from inference.policies import POLICIES, CacheShape
from inference.policies.base import LEAST
from inference.policies.ems import EMS
from inference.policies.h2o import H2O
from inference.policies.keyformer import Keyformer
from inference.policies.squeezed import Squeezed, clustered
from inference.policies.token_select import TokenSelect
from tests.unit.inference.builders import ids
from tests.unit.inference.test_paths import requests, together

EVICTING = [name for name, policy in POLICIES.items() if policy.evicts]
SMALL = EngineConfig(page_tokens=4, pack=False, step_tokens=64)
LONG = "the cat sat on the mat. a dog sat on the log. " * 14


@pytest.fixture(scope="module")
def small(model_folder: Path) -> Engine:
    return Engine(model_folder, SMALL)


def asks(policy: str, budget: float, **params) -> SamplingParams:
    values = {"max_tokens": 24, "temperature": 0.0, "ignore_eos": True, "seed": 1, **params}
    return SamplingParams(methods=Methods(kv_policy=policy, kv_budget=budget), **values)


def test_the_registry_is_what_the_schema_offers():
    assert ("full", *POLICIES) == KV_POLICIES


@pytest.mark.parametrize("policy", POLICIES)
def test_a_whole_budget_is_full_attention(policy: str, model_folder: Path, small: Engine):
    expected = together(small, work := requests(small))
    engine = Engine(
        model_folder,
        replace(SMALL, kv_policy=policy, kv_budget=1.0, step_tokens=17, mixed_tokens=5, mixed_slowdown=0.0),
    )
    assert together(engine, work) == expected
    assert engine.stats.prefix_hit_tokens == 0
    assert engine.pool.remembered == 0  # nothing of a lossy text reaches others


@pytest.mark.parametrize("policy", EVICTING)
def test_evicted_tokens_free_their_memory(policy: str, small: Engine):
    prompt = small.encode(LONG)
    budget = 0.25
    generation = small.start(prompt, asks(policy, budget, max_tokens=60))
    assert generation.lossy == (f"kv_policy={policy}:0.25",)
    small.submit(generation)
    while small.busy:
        small.step()
        most = max(LEAST, budget * max(len(prompt), generation.computed))
        if not generation.finished:
            used = small.pool.used * SMALL.page_tokens
            assert used <= most + 2 * SMALL.page_tokens
            assert used >= min(generation.held, most // 2)
    assert small.pool.used == 0
    assert generation.completion_tokens == 60
    assert ids(small, prompt, asks(policy, budget)) == generation.tokens[len(prompt) :][:24]  # the same again


@pytest.mark.parametrize("policy", POLICIES)
def test_lossy_and_plain_texts_run_side_by_side(policy: str, model_folder: Path):
    engine = Engine(model_folder, replace(SMALL, kv_tokens=600))
    prompt = engine.encode(LONG)[:400]
    plain_params = asks("full", 1.0)
    expected = ids(engine, prompt, plain_params)
    texts = [engine.start(prompt, asks(policy, 0.3, seed=seed)) for seed in range(3)]
    texts.insert(1, engine.start(prompt, plain_params))
    for text in texts:
        engine.submit(text)
    while engine.busy:
        engine.step()
    assert engine.pool.used == 0
    assert texts[1].tokens[len(prompt) :] == expected
    assert all(text.completion_tokens == 24 for text in texts)
    assert texts[0].cached_tokens == texts[2].cached_tokens == 0


@pytest.mark.parametrize("fields", [{"kv_policy": "h3o"}, {"kv_budget": 0.0}, {"kv_budget": 1.5}])
def test_unknown_methods_are_refused_by_name(fields: dict):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        Methods(**fields)


SHAPE = CacheShape(layers=1, kv_heads=2, page_tokens=4)


def masked_logits(group: int, rows: int, held: int, seed: int = 0) -> torch.Tensor:
    """Logits of the last ``rows`` of ``held`` tokens, causal, [2, group, rows, held]."""
    logits = torch.randn(2, group, rows, held, generator=torch.Generator().manual_seed(seed))
    return logits + torch.full((rows, held), -torch.inf).triu(held - rows + 1)


def test_heavy_hitters_are_those_of_the_whole_attention_matrix_in_whatever_chunks_it_comes():
    logits = masked_logits(3, 40, 40)
    expected = torch.zeros(2, 40)
    for head in range(2):
        for group in range(3):
            for row in range(40):
                expected[head] += logits[head, group, row].softmax(0)
    policy = H2O(SHAPE, 0.5, 40, 0)
    for start, end in ((0, 7), (7, 8), (8, 33), (33, 40)):
        policy.observe(0, logits[:, :, start:end, :end].clone(), end)
    torch.testing.assert_close(policy.mass_LKT[0, :, :40], expected, rtol=1e-5, atol=1e-6)
    keep = policy.keep(0, 40, 20)
    for head in range(2):
        heavy = sorted(sorted(range(30), key=lambda t: -float(expected[head, t]))[:10])
        assert keep[head].tolist() == heavy + list(range(30, 40))


def test_evicted_keys_and_values_are_gone_and_scores_follow_the_others():
    policy, rows = H2O(SHAPE, 0.5, 40, 0), torch.arange(40.0)
    policy.observe(0, masked_logits(1, 40, 40), 40)
    before = policy.mass_LKT[0, :, :40].clone()
    keys = torch.stack((rows, 100 + rows))[..., None]
    kept, values = policy.compress(0, keys, -keys, 20)
    torch.testing.assert_close(values, -kept)
    for head in range(2):
        index = (kept[head, :, 0] - 100 * head).long()
        torch.testing.assert_close(policy.mass_LKT[0, head, :20], before[head, index])
    assert not policy.mass_LKT[0, :, 20:].any()


def test_keyformer_without_noise_at_its_first_temperature_is_h2o():
    plain, other = H2O(SHAPE, 0.5, 40, 0), Keyformer(SHAPE, 0.5, 40, 0, noise=0.0)
    noisy = [Keyformer(SHAPE, 0.5, 40, seed) for seed in (1, 1, 2)]
    for policy in (plain, other, *noisy):
        policy.observe(0, masked_logits(2, 40, 40), 40)
    torch.testing.assert_close(other.mass_LKT, plain.mass_LKT)
    assert torch.equal(noisy[0].mass_LKT, noisy[1].mass_LKT)
    assert not torch.equal(noisy[0].mass_LKT, noisy[2].mass_LKT)


def test_ems_merges_what_is_alike_and_evicts_what_is_not():
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 40, 8, generator=generator) for _ in range(2))
    keys[:, 20], values[:, 20] = keys[:, 10], values[:, 10]  # a twin: merging it changes nothing
    policies = [EMS(SHAPE, 0.5, 40, 0, similar=similar) for similar in (2.0, 0.999)]
    for policy in policies:
        policy.observe(0, masked_logits(2, 40, 40), 40)
    evicted, merged = (policy.compress(0, keys, values, 20) for policy in policies)
    index = policies[0].score(0, 20)
    assert index.shape == (2, 20)
    for kept, whole in zip(evicted, (keys, values), strict=True):  # pure eviction: rows as they were
        assert all(any(torch.allclose(row, other) for other in whole[h]) for h in range(2) for row in kept[h])
    torch.testing.assert_close(merged[0], evicted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged[1], evicted[1], rtol=1e-5, atol=1e-5)
    loose = EMS(SHAPE, 0.5, 40, 0, similar=-1.0)
    loose.observe(0, masked_logits(2, 40, 40), 40)
    assert not torch.allclose(loose.compress(0, keys, values, 20)[1], evicted[1])


@pytest.mark.parametrize("rows", [1, 5])
def test_token_select_reads_what_the_heads_vote_for(rows: int):
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(2, 400, 8, generator=generator)
    queries = torch.randn(rows, 2, 3, 8, generator=generator)
    policy = TokenSelect(SHAPE, 0.3, 400, 0)
    chosen = policy.select(0, queries, [keys[:, :150], keys[:, 150:]])
    assert chosen is not None
    votes = torch.zeros(400)
    for head in range(2):
        for query in range(3):
            mean = queries[:, head, query].mean(0)
            votes[4:336] += (keys[head, 4:336] @ mean / 8**0.5).softmax(0)
    best = sorted(sorted(range(4, 336), key=lambda t: -float(votes[t]))[:52])
    assert chosen.tolist() == [*range(4), *best, *range(336, 400)]
    longer = torch.cat((keys, torch.randn(2, 2, 8, generator=generator)), 1)
    again = policy.select(0, queries, [longer])
    assert again is not None
    assert again.tolist() == [*chosen.tolist(), 400, 401]  # a like query reads the same and what is new
    assert policy.reused == 1
    policy.select(0, -queries, [longer])
    assert policy.reused == 1


def test_squeezed_attention_reads_the_clusters_nearest_to_the_query():
    generator = torch.Generator().manual_seed(5)
    centres = torch.eye(8)[:5] * 6
    label = torch.randint(5, (432,), generator=generator)
    keys = (centres[label] + 0.1 * torch.randn(432, 8, generator=generator)).expand(2, -1, -1).contiguous()
    policy = Squeezed(SHAPE, 0.3, 432, 0)
    assert policy.select(0, torch.ones(1, 2, 1, 8), [keys]) is None  # the prompt itself is read exactly
    longer = torch.cat((keys, keys[:, :1]), 1)
    chosen = policy.select(0, centres[[3, 1]].view(1, 2, 1, 8), [longer])
    assert chosen is not None
    assert chosen.shape == (2, 129)
    for head, wanted in enumerate((3, 1)):
        fixed = [t for t in chosen[head].tolist() if t < 400]
        assert len(set(fixed)) == 96
        inside = (label[fixed] == wanted).sum()
        assert inside >= min(90, int((label[:400] == wanted).sum()))
        assert set(range(400, 433)) <= set(chosen[head].tolist())


def test_clusters_hold_every_key_once_and_their_centroids_are_means():
    keys = torch.randn(2, 90, 6, generator=torch.Generator().manual_seed(2))
    centroids, member = clustered(keys, 7, 0)
    assert member.shape == (2, 90)
    for head in range(2):
        for cluster in member[head].unique().tolist():
            torch.testing.assert_close(centroids[head, cluster], keys[head][member[head] == cluster].mean(0))


@pytest.fixture(scope="module")
def finder(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A model that looks words up in its context."""
    folder = needle_model.write(tmp_path_factory.mktemp("finder") / "model")
    return Engine(folder, EngineConfig(pack=False, kv_tokens=2048, step_tokens=160))


def recall(engine: Engine, policy: str, budget: float) -> float:
    """The share of needles found in haystacks of 500 words."""
    generator, found = random.Random(0), 0
    for _ in range(8):
        words, known = haystack(generator, 500, 20)
        key = generator.choice(list(known))
        prompt = engine.encode(" " + " ".join([*words, "?", key]))
        token = ids(engine, prompt, asks(policy, budget, max_tokens=1))[0]
        found += engine.tokenizer.decode([token]).strip() == known[key]
    return found / 8


def test_policies_find_needles_that_sinks_and_recency_lose(finder: Engine):
    assert recall(finder, "full", 1.0) == 1.0
    control = recall(finder, "sinks_recency", 0.3)
    assert control <= 0.5
    for policy in POLICIES:
        if policy != "sinks_recency":
            assert recall(finder, policy, 0.3) >= control + 0.2, policy
