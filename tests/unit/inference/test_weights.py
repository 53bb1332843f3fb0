from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from conf.errors import ConfigError
from conf.serving import EngineConfig
from inference import int8_rows, weights
from inference.engine import Engine
from inference.params import SamplingParams
from inference.weights import GROUP, PACKED_ROWS, QUANTISED_ROWS, Int4Linear, Int8Linear, linear

ROWS = (1, 2, 5, 7, QUANTISED_ROWS + 1, PACKED_ROWS, PACKED_ROWS + 1)
# Half a step of the largest weight, for normal weights about 3.5 deviations (a group's range: about 4.5), beside one.
BOUND = {"fp32": 1e-5, "int8": 0.02, "int4": 0.12}


@pytest.mark.parametrize("form", BOUND)
@pytest.mark.parametrize("biased", [False, True])
def test_every_form_is_near_the_plain_product_at_any_number_of_rows(form: str, biased: bool):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 3 * GROUP, generator=generator)
    bias = torch.randn(96, generator=generator) if biased else None
    layer = linear(weight, bias, form, pack=True)
    for rows in ROWS:
        x = torch.randn(rows, 3 * GROUP, generator=generator)
        expected = F.linear(x, weight, bias)
        found = layer(x)
        assert found.dtype == torch.float32
        assert ((found - expected).norm() / expected.norm()).item() < BOUND[form], rows


@pytest.mark.parametrize("faster", [False, True])
def test_a_packed_weight_is_the_only_copy_where_onednn_is_faster(faster: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weights, "onednn_is_faster", lambda: faster)
    layer = linear(torch.ones(96, 64), torch.ones(96), "fp32", pack=True)
    plain = [v for v in vars(layer).values() if isinstance(v, torch.Tensor) and not v.is_mkldnn]
    assert sum(v.numel() for v in plain) == 96 + (0 if faster else 96 * 64)
    for rows in (0, *ROWS):
        torch.testing.assert_close(layer(torch.ones(rows, 64)), torch.full((rows, 96), 65.0))


def test_eight_bits_in_one_loop_are_the_restored_weight():
    generator = torch.Generator().manual_seed(2)
    layer = Int8Linear(torch.randn(97, 65, generator=generator), None)
    x = torch.randn(3, 65, generator=generator)
    restored = layer._weight * layer._scale[:, None]
    torch.testing.assert_close(int8_rows.product(x, layer._weight, layer._scale), x @ restored.T, atol=1e-4, rtol=1e-5)


def test_four_bits_restore_the_grid_that_the_kernel_uses():
    weight = torch.randn(64, 2 * GROUP, generator=torch.Generator().manual_seed(1))
    layer = Int4Linear(weight, None)
    x = torch.eye(2 * GROUP)[:QUANTISED_ROWS]
    torch.testing.assert_close(layer(x), layer._restored(torch.float32).T[:QUANTISED_ROWS], atol=2e-2, rtol=1e-2)
    with pytest.raises(ConfigError, match="int4"):
        Int4Linear(torch.randn(8, GROUP + 1), None)


@pytest.mark.parametrize(("form", "bound"), [("bf16", 0.15), ("int8", 0.15)])
def test_a_model_in_another_form_scores_a_text_alike(form: str, bound: float, engine: Engine, model_folder: Path):
    prompt = engine.encode("the cat sat on the mat. " * 2)
    params = SamplingParams(max_tokens=0, prompt_logprobs=True)
    scores = []
    for own in (engine, Engine(model_folder, EngineConfig(dtype=form))):
        generation = own.start(prompt, params)
        own.submit(generation)
        while own.busy:
            own.step()
        scores.append(torch.tensor([entry.value for entry in generation.prompt_logprobs]))
    assert (scores[0] - scores[1]).abs().mean().item() < bound
