"""Estimates against independent counts."""

import math
from typing import Any

import pytest

from conf.estimate import flops_per_token, parameter_count, ring_buffer_bytes, ring_traffic
from conf.schema import ExpertsConfig, ModelConfig, RunConfig
from launch.preflight import load_config


def test_parameter_count_of_llama_3_2_1b() -> None:
    """Meta publishes 1.23 B parameters; the exact count of the released weights is 1,235,814,400."""
    model = ModelConfig(dim=2048, layers=16, heads=32, kv_heads=8, head_dim=64, ffn_dim=8192)
    assert parameter_count(model, 128_256) == 1_235_814_400


@pytest.mark.parametrize("tied", [True, False])
def test_parameter_count_adds_up_by_hand(tied: bool) -> None:
    model = ModelConfig(dim=8, layers=2, heads=2, kv_heads=1, ffn_dim=16, tie_embeddings=tied)
    block = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 3 * 8 * 16 + 2 * 8
    assert parameter_count(model, 100) == 2 * block + 8 + 100 * 8 * (1 if tied else 2)


@pytest.mark.parametrize(
    ("model", "vocabulary", "context"),
    [
        (ModelConfig(dim=64, layers=2, heads=4, kv_heads=2), 256, 128),
        (ModelConfig(dim=96, layers=3, heads=6, kv_heads=3, head_dim=32, ffn_dim=200, tie_embeddings=False), 500, 64),
        (ModelConfig(dim=64, layers=1, heads=2, kv_heads=2), 300, 256),
    ],
)
def test_flops_are_those_that_torch_counts(model: ModelConfig, vocabulary: int, context: int) -> None:
    """Products with weights exactly; attention as products of whole matrices, of which the causal half is useful."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from fused.products import onednn_is_faster
    from models.decoder import Decoder, ModelSpec

    def plain(q_BSHD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, _: object) -> torch.Tensor:
        groups = q_BSHD.shape[2] // k_BSKD.shape[2]
        k, v = (x.repeat_interleave(groups, 2).transpose(1, 2) for x in (k_BSKD, v_BSKD))
        scores = (q_BSHD.transpose(1, 2) @ k.transpose(2, 3)).softmax(-1)
        return (scores @ v).transpose(1, 2)

    decoder = Decoder(ModelSpec.from_config(model, vocabulary, context)).initialise(0)
    decoder.set_attention_core(plain)
    tokens = torch.randint(vocabulary, (2, context))
    # The loss adds to its weight's gradient in place, which torch's table does not know.
    mapping: dict[Any, Any] = {torch.ops.aten.addmm_: lambda _, a, b, **options: 2 * a[0] * a[1] * b[1]}
    if onednn_is_faster():  # nor oneDNN's product
        mapping[torch.ops.mkldnn._linear_pointwise] = lambda x, weight, *_, **options: 2 * math.prod(x) * weight[0]
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        loss, _ = decoder.loss(tokens, tokens, torch.arange(context).expand_as(tokens))
        loss.backward()
    counts = {str(name): count / tokens.numel() for name, count in counter.get_flop_counts()["Global"].items()}
    total, attention = flops_per_token(model, vocabulary, context)
    assert counts.pop("aten.bmm") == 2 * attention
    assert sum(counts.values()) == total - attention


def test_traffic_follows_the_volume_table() -> None:
    config = RunConfig()
    config.cluster.ranks = 4
    config.data.context, config.trainer.micro_batch, config.trainer.batch = 1024, 1, 1
    q = 256 * 8 * 32 * 4
    token_ring = ring_traffic(config)
    assert token_ring.forward == 3 * (q + q + 256 * 8 * 4)
    assert token_ring.backward == 3 * (2 * q + 2 * 256 * 8 * 4 + q)
    config.sequence.strategy = "ring"
    ring = ring_traffic(config)
    assert ring.forward == 3 * q  # half the heads in keys, twice for values
    assert ring.backward == 3 * 2 * q


def test_buffers_do_not_grow_with_the_ranks_at_equal_shards() -> None:
    def buffers(ranks: int) -> int:
        config = RunConfig()
        config.cluster.ranks, config.data.context = ranks, 256 * ranks
        return ring_buffer_bytes(config)

    assert buffers(2) == buffers(4) == buffers(8)
    config = RunConfig()
    config.cluster.ranks = 1
    assert ring_buffer_bytes(config) == 0


# MoMa, table 1 (arXiv 2407.21770): millions of parameters by size of the dense model and kind.
TABLE_1 = {
    ("moma_90m", "none"): 92,
    ("moma_435m", "none"): 436,
    ("moma_1_4b", "none"): 1476,
    ("moma_90m", "moe_8x"): 210,
    ("moma_435m", "moe_4t4i"): 1850,
    ("moma_1_4b", "moe_7t1i"): 7110,
    ("moma_90m_depth", "none"): 111,
    ("moma_435m_depth", "none"): 637,
    ("moma_1_4b_depth", "none"): 2340,
    ("moma_90m_depth", "moe_8x"): 320,
    ("moma_435m_depth", "moe_4t4i"): 2990,
    ("moma_1_4b_depth", "moe_6t2i"): 11850,
}
MOMA = ["data.vocab_size=65536", "data.context=4096", "sequence=local", "cluster.ranks=1"]


@pytest.mark.parametrize(("model", "experts"), TABLE_1)
def test_parameter_counts_are_those_of_moma(model: str, experts: str) -> None:
    config = load_config([f"model={model}", f"experts={experts}", *MOMA])
    millions = parameter_count(config.model, 65536) / 1e6
    rounding = 5.0 if TABLE_1[model, experts] % 10 == 0 else 0.5  # of billions, the table shows two decimals
    assert millions == pytest.approx(TABLE_1[model, experts], abs=rounding + 0.11)  # it leaves norms and routers out


@pytest.mark.parametrize("size", ["moma_90m", "moma_435m", "moma_1_4b"])
def test_sparse_models_cost_what_the_dense_one_does(size: str) -> None:
    def flops(model: str, experts: str) -> int:
        config = load_config([f"model={model}", f"experts={experts}", *MOMA])
        return flops_per_token(config.model, 65536, 4096)[0]

    dense = flops(size, "none")
    for experts in ("moe_1t1i", "moe_4t4i", "moe_8x"):
        assert flops(size, experts) == pytest.approx(dense, rel=0.02)
    assert flops(f"{size}_depth", "moe_4t4i") == pytest.approx(dense, rel=0.06)


def test_routers_are_counted() -> None:
    model = ModelConfig(dim=8, layers=3, heads=2, kv_heads=2, ffn_dim=16, depth=0.5)
    dense = parameter_count(model, 100)
    assert dense == parameter_count(ModelConfig(dim=8, layers=3, heads=2, kv_heads=2, ffn_dim=16), 100) + 2 * 8
    model.experts = ExpertsConfig(groups=[2, 1])
    assert parameter_count(model, 100) == dense + 3 * (2 * 3 * 8 * 16 + 3 * 8)
    model.experts.causal = "auxiliary"
    assert parameter_count(model, 100) == dense + 3 * (2 * 3 * 8 * 16 + 3 * 8 + 4 * 11) + 2 * 4 * 9
