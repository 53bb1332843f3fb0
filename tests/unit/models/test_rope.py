from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from models.rope import inverse_frequencies, rotation
from models.spec import RopeSpec

KINDS = {
    "default": RopeSpec(theta=500000.0),
    "linear": RopeSpec(kind="linear", factor=4.0),
    "llama3": RopeSpec(500000.0, "llama3", 8.0, 1.0, 4.0, 64),
}


def reference(spec: RopeSpec, head_dim: int) -> LlamaRotaryEmbedding:
    parameters: dict[str, Any] = {"rope_type": spec.kind, "rope_theta": spec.theta}
    if spec.kind != "default":
        parameters["factor"] = spec.factor
    if spec.kind == "llama3":
        parameters["low_freq_factor"] = spec.low_freq_factor
        parameters["high_freq_factor"] = spec.high_freq_factor
        parameters["original_max_position_embeddings"] = spec.original_context
    config: Any = LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, rope_parameters=parameters
    )
    return LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("kind", KINDS)
def test_rotation_equals_transformers(kind: str):
    spec, head_dim = KINDS[kind], 32
    theirs = reference(spec, head_dim)
    torch.testing.assert_close(inverse_frequencies(head_dim, spec), theirs.inv_freq, rtol=1e-6, atol=0)
    positions = torch.tensor([[0, 1, 17, 4000], [5, 4, 3, 2047]])
    x = torch.randn(2, 4, 3, head_dim, generator=torch.Generator().manual_seed(0))
    cos, sin = theirs(x, positions)
    expected, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)
    # Frequencies that differ in the last bit differ by 2e-4 radians at position 4000.
    mine = rotation(positions, head_dim, spec).apply(x)
    torch.testing.assert_close(mine, expected.transpose(1, 2), rtol=0, atol=1e-3)


def test_scores_depend_on_the_distance_alone():
    q = torch.randn(1, 1, 1, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    k = torch.randn(1, 1, 1, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def score(i: int, j: int) -> float:
        turned = [rotation(torch.tensor([[n]]), 16, RopeSpec()).apply(x) for x, n in ((q, i), (k, j))]
        return float((turned[0] * turned[1]).sum())

    assert score(5, 2) == pytest.approx(score(105, 102), abs=1e-4)
    assert score(5, 2) != pytest.approx(score(5, 3), abs=1e-2)


def test_the_dtype_of_the_input_is_kept_and_the_angles_are_exact():
    turn = rotation(torch.tensor([[100003]]), 8, RopeSpec())
    assert turn.cos.dtype == torch.float32
    assert turn.apply(torch.ones(1, 1, 1, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
