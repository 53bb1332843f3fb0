"""At inference the future changes nothing: thresholds, auxiliary routers, mixture of depths, the cache."""

from typing import Any

import pytest
import torch
from torch import Tensor

from models.cache import KVCache
from models.decoder import Decoder
from models.moe.upcycle import add_auxiliary
from tests.unit.models.builders import SMALL
from tests.unit.models.moe import mixed_tokens, moe_model

MODELS: dict[str, dict[str, Any]] = {
    "4t4i": {},
    "1t1i": {"groups": (1, 1)},
    "8x after norm": {"groups": (8,), "norm": "post"},
    "auxiliary": {"causal": "auxiliary"},
    "token choice": {"groups": (8,), "routing": "token_choice"},
    "depth": {"groups": (), "depth": 0.25},
    "depth, 4t4i": {"depth": 0.5},
    "depth, auxiliary": {"depth": 0.25, "causal": "auxiliary", "groups": (2, 2)},
}
LOOKS_AHEAD = [name for name in MODELS if name not in ("1t1i", "token choice")]


def calibrated(name: str) -> Decoder:
    """A model whose thresholds have seen a few batches, with auxiliary routers that correct them."""
    model = moe_model(**MODELS[name])
    for router in model.routers():
        if router.auxiliary is not None:
            torch.nn.init.normal_(router.auxiliary.out.weight)
    model.control.learn_auxiliary = "auxiliary" in name
    for seed in range(5):
        tokens, positions = mixed_tokens(4, 48, seed=seed)
        model.loss(tokens, tokens, positions)
        for router in model.routers():
            router.calibrate(router.take_observed(), 0.001)
    model.control.learn_auxiliary = False
    return model


def change_of_prefix(model: Decoder) -> float:
    """How far the logits of 24 tokens move when those behind them do."""
    tokens, positions = mixed_tokens(2, 48, seed=9)
    other = tokens.clone()
    other[:, 24:] = mixed_tokens(2, 48, text=0.2, seed=10)[0][:, 24:]
    with torch.no_grad():
        before, after = model(tokens, positions), model(other, positions)
    return (before - after)[:, :24].abs().max().item()


@pytest.mark.parametrize("name", MODELS)
def test_a_suffix_changes_no_logit_of_its_prefix_at_inference(name: str) -> None:
    assert change_of_prefix(calibrated(name).eval()) < 1e-4


@pytest.mark.parametrize("name", LOOKS_AHEAD)
def test_expert_choice_itself_looks_ahead(name: str) -> None:
    assert change_of_prefix(calibrated(name).train()) > 0.1


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunks", [[30], [1] * 30, [9, 1, 1, 13, 6]])
def test_generation_under_the_cache_equals_the_whole_forward_pass(name: str, chunks: list[int]) -> None:
    model = calibrated(name).eval()
    tokens, positions = mixed_tokens(1, 30, seed=3)
    cache, parts, start = KVCache(model.spec, block=8), [], 0
    with torch.no_grad():
        whole = model(tokens, positions)
        for size in chunks:
            parts.append(model(tokens[:, start : start + size], positions[:, start : start + size], cache=cache))
            start += size
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
        cache.truncate(17)
        again = model(tokens[:, 17:], positions[:, 17:], cache=cache)
    torch.testing.assert_close(again, whole[:, 17:], rtol=1e-4, atol=1e-4)


def loads(model: Decoder, way: str) -> Tensor:
    """Tokens that each expert of each router takes of a new batch."""
    model.control.way = way
    tokens, positions = mixed_tokens(8, 48, seed=77)
    with torch.no_grad():
        model(tokens, positions)
    model.control.way = ""
    return torch.cat([router.take_observed().load for router in model.routers()])


def test_thresholds_take_about_as_many_tokens_as_the_experts_do() -> None:
    model = calibrated("4t4i")
    by_experts, by_threshold = loads(model, "experts"), loads(model, "threshold")
    assert 0.8 < (by_threshold.sum() / by_experts.sum()).item() < 1.25


def test_auxiliary_routers_begin_with_the_choice_of_the_thresholds() -> None:
    model = calibrated("4t4i")
    grown, (tokens, positions) = add_auxiliary(model, 1).eval(), mixed_tokens(2, 48, seed=5)
    with torch.no_grad():
        assert torch.equal(grown(tokens, positions), model.eval()(tokens, positions))


def test_auxiliary_routers_learn_the_choice_of_a_frozen_model() -> None:
    model = moe_model(causal="auxiliary", depth=0.5)
    learned = [p for router in model.routers() if router.auxiliary for p in router.auxiliary.parameters()]
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is one for one in learned))
    model.control.learn_auxiliary = True
    optimizer = torch.optim.AdamW(learned, lr=1e-2)
    losses, right = [], []
    for step in range(50):
        tokens, positions = mixed_tokens(4, 48, seed=step)
        total, count = model.loss(tokens, tokens, positions)
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((total / count).item())
        seen = [router.take_observed() for router in model.routers()]
        for router, one in zip(model.routers(), seen, strict=True):
            router.calibrate(one, 0.0)
        every = torch.stack([one.guessed for one in seen]).sum(0)
        right.append((every[1] / every[0]).item())
    assert losses[-1] < 0.7 * losses[0]
    assert right[-1] > 0.8, "a coin is right half of the time, a constant three quarters"
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_depth_layers_work_on_their_share_of_every_window() -> None:
    model = moe_model(groups=(), depth=0.25)
    lengths: list[int] = []
    for layer in model.layers:
        layer.attention.register_forward_hook(lambda _, given, __: lengths.append(given[0].shape[1]))  # pyright: ignore
    tokens, positions = mixed_tokens(2, 48)
    model(tokens, positions)
    assert lengths == [12, 48, 12]


def test_depth_equals_its_definition() -> None:
    """``x + g * (layer(x) - x)`` for the best-scored quarter of a window, computed apart; the rest passes by."""
    model = moe_model(groups=(), depth=0.25).double()
    block = model.layers[0]
    tokens, positions = mixed_tokens(1, 24)
    x = model.embed(tokens)
    router = model.routers()[0]
    scores = torch.sigmoid(x[0] @ router.weight[0])
    kept = sorted(sorted(range(24), key=lambda i: (-scores[i].item(), i))[:6])
    exact = x.clone()
    plain = Decoder(model.spec.__class__(**{**model.spec.__dict__, "depth": 1.0})).double()
    plain.layers[0].load_state_dict(block.state_dict(), strict=False)
    batch = plain.describe(tokens[:, kept], positions[:, kept], None, None)
    out = plain.layers[0](x[:, kept], batch)
    exact[0, kept] = x[0, kept] + scores[kept, None] * (out - x[:, kept])[0]
    ours = block(x, model.describe(tokens, positions, None, None))
    torch.testing.assert_close(ours, exact)


def test_documents_stay_apart_under_depth() -> None:
    model = moe_model(groups=(2, 2), depth=0.5)
    tokens, positions = mixed_tokens(2, 40, seed=4)
    ids = torch.cat([torch.zeros(2, 25), torch.ones(2, 15)], 1).long()
    total, count = model.loss(tokens, tokens.roll(-1, 1), positions, ids)
    total.backward()
    assert torch.isfinite(total)
    assert int(count) == 80
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


def test_ranges_of_the_vocabulary_give_the_modality() -> None:
    model = moe_model()
    first = SMALL.vocab_size - 32
    assert model.modality_of(torch.tensor([0, first - 1, first, SMALL.vocab_size - 1])).tolist() == [0, 0, 1, 1]
