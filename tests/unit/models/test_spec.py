import pytest

from conf.errors import ConfigError
from conf.schema import ModelConfig
from models.decoder import Decoder, ModelSpec, RopeSpec
from tests.unit.models.builders import small_model


def test_zeros_are_resolved():
    spec = ModelSpec.from_config(ModelConfig(dim=256, heads=8, kv_heads=4), 1000, context=512)
    assert (spec.head_dim, spec.ffn_dim, spec.vocab_size, spec.context) == (32, 704, 1000, 512)


def test_explicit_sizes_are_kept():
    spec = ModelSpec.from_config(ModelConfig(dim=100, heads=8, kv_heads=1, head_dim=6, ffn_dim=33), 10)
    assert (spec.head_dim, spec.ffn_dim) == (6, 33)


@pytest.mark.parametrize("tied", [True, False])
def test_parameter_count_is_what_torch_allocates(tied: bool):
    model = small_model(tie_embeddings=tied)
    assert sum(p.numel() for p in model.parameters()) == model.spec.parameters()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"heads": 6, "kv_heads": 4, "head_dim": 8}, "model.kv_heads"),
        ({"heads": 8, "kv_heads": 16}, "model.kv_heads"),
        ({"head_dim": 7}, "model.head_dim"),
        ({"dim": 100}, "model.dim"),
        ({"dim": 0}, "model.dim"),
        ({"heads": 0}, "model.heads"),
        ({"layers": -1}, "model.layers"),
        ({"kv_heads": 0}, "model.kv_heads"),
        ({"norm_eps": 0.0}, "model.norm_eps"),
        ({"rope_theta": float("nan")}, "model.rope_theta"),
        ({"init_std": -1.0}, "model.init_std"),
    ],
)
def test_impossible_sizes_are_config_errors(changes: dict, field: str):
    with pytest.raises(ConfigError) as error:
        ModelSpec.from_config(ModelConfig(**changes), 100)
    assert error.value.field == field
    assert error.value.rule
    assert error.value.fix


def test_unknown_rope_kind_is_refused():
    with pytest.raises(ConfigError, match="yarn"):
        Decoder(small_model(rope=RopeSpec(kind="yarn")).spec)
