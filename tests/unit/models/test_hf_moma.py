"""Model folders of MoMa models: what is written is read, and answers the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from conf.errors import DataError
from models.decoder import Decoder
from models.hf import load_hf, read_spec, save_hf
from tests.unit.models.moe import mixed_tokens, moe_model

VARIANTS: dict[str, dict[str, Any]] = {
    "4t4i": {},
    "8x after norm": {"groups": (8,), "norm": "post"},
    "1t1i": {"groups": (1, 1)},
    "auxiliary": {"causal": "auxiliary", "depth": 0.5},
    "token choice": {"groups": (4,), "routing": "token_choice"},
    "depth": {"groups": (), "depth": 0.25},
}


def used(**changes: Any) -> Decoder:
    """A model whose thresholds or biases are no longer the first ones."""
    model = moe_model(**changes)
    tokens, positions = mixed_tokens(2, 40)
    model.loss(tokens, tokens, positions)
    for router in model.routers():
        router.calibrate(router.take_observed(), 0.01)
    return model.eval()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_folder_gives_the_model_back(variant: str, dtype: str, tmp_path: Path) -> None:
    model = used(**VARIANTS[variant])
    save_hf(model, tmp_path / "hf", dtype=dtype, shard_bytes=60_000)
    assert read_spec(tmp_path / "hf") == model.spec
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["SundogMoMaForCausalLM"], "sundog_moma")
    again = load_hf(tmp_path / "hf").eval()
    state = again.state_dict()
    for name, value in model.state_dict().items():
        exact = dtype == "fp32" or name.endswith(("threshold", "steps", "bias"))
        assert torch.equal(state[name], value if exact else value.bfloat16().float()), name
    if dtype == "fp32":
        tokens, positions = mixed_tokens(2, 40, seed=5)
        with torch.no_grad():
            torch.testing.assert_close(again(tokens, positions), model(tokens, positions), rtol=1e-4, atol=1e-4)


def test_a_dense_model_of_two_modalities_stays_a_llama(tmp_path: Path) -> None:
    model = moe_model(groups=()).eval()
    save_hf(model, tmp_path / "hf")
    assert read_spec(tmp_path / "hf").modalities == ("text", "image")
    tokens, positions = mixed_tokens(2, 40)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(tokens).logits
        torch.testing.assert_close(model(tokens, positions), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("damage", ["no moma", "no groups", "bad depth"])
def test_a_config_that_lacks_its_own_part_is_an_error(damage: str, tmp_path: Path) -> None:
    save_hf(moe_model(), tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    if damage == "no moma":
        del config["moma"]
    elif damage == "no groups":
        del config["moma"]["experts"]["groups"]
    else:
        config["moma"]["modality_tokens"] = [97]
    path.write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"moma|modality_tokens"):
        load_hf(tmp_path / "hf")
