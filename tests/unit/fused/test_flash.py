"""FlashAttention behind the contract of a block, with stand-ins that have its signatures; none of it on a GPU."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conf.errors import ResourceError
from fused import block, flash, reference
from fused.mask import CAUSAL, FULL, BlockMask, Mask
from tests.helpers import fake_flash

LIBRARIES = {3: flash.Flash3(fake_flash.flash3()), 4: flash.Flash4(fake_flash.flash4())}


def _mask(rule: Mask, queries: range, keys: int) -> BlockMask:
    rows = np.array(queries)
    return BlockMask.of(rule.ranges(rows, max(keys, queries.stop)), rows, np.arange(keys))


@pytest.mark.parametrize(
    ("mask", "kind"),
    [
        (_mask(FULL, range(5), 7), False),
        (_mask(CAUSAL, range(7, 12), 7), False),  # keys that all lie in the past
        (_mask(CAUSAL, range(7), 7), True),
        (_mask(CAUSAL, range(4, 7), 7), True),
        (_mask(CAUSAL, range(4), 7), None),
        (_mask(Mask(left=2, right=0), range(7), 7), None),
        (_mask(FULL, range(5), 0), None),
    ],
)
def test_only_full_and_right_aligned_causal_masks_are_theirs(mask: BlockMask, kind: bool | None) -> None:
    assert flash.causal(mask) is kind


@pytest.mark.parametrize("version", LIBRARIES)
@pytest.mark.parametrize("causal", [False, True])
def test_a_block_of_a_longer_sequence_gets_its_share(version: int, causal: bool) -> None:
    """The statistics are those of all keys, of which the block has the last: delta is not its own output's."""
    generator = torch.Generator().manual_seed(version)
    q, d_out = (torch.randn(2, 6, 4, 16, generator=generator).to(torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(2, 9, 2, 16, generator=generator).to(torch.bfloat16) for _ in range(2))
    rule, scale = CAUSAL if causal else FULL, 0.25
    whole, part = _mask(rule, range(3, 9), 9), _mask(rule, range(1, 7), 7)
    out, lse = reference.forward(q.float(), k.float(), v.float(), whole, scale)
    delta = (out * d_out.float()).sum(-1)
    keys = slice(2, 9)
    assert flash.causal(part) is causal
    exact = reference.backward(
        *(q.float(), k[:, keys].float(), v[:, keys].float(), d_out.float(), lse, delta, part, scale)
    )
    library = LIBRARIES[version]
    ours = library.backward(q, k[:, keys], v[:, keys], d_out, lse, delta, scale, causal)
    block_out, block_lse = library.forward(q, k[:, keys], v[:, keys], scale, causal)
    wanted = reference.forward(q.float(), k[:, keys].float(), v[:, keys].float(), part, scale)
    for result, truth in zip((*ours, block_out, block_lse), (*exact, *wanted), strict=True):
        assert (result.float() - truth).norm() <= 6e-3 * truth.norm()


@pytest.mark.parametrize("size", [1.0, 1e-15, 1e-30])
def test_the_stand_in_output_has_the_row_sums(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    d_out = (torch.randn(2, 5, 3, 64, generator=generator) * size).to(torch.bfloat16)
    d_out[0, 1] = 0.0
    delta = (d_out.float() * torch.randn(2, 5, 3, 64, generator=generator)).sum(-1)
    sums = (flash.output_with(d_out, delta).double() * d_out.double()).sum(-1)
    assert torch.allclose(sums, delta.double(), rtol=4e-3, atol=0.0)


def test_a_version_is_found_by_capability_and_only_if_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(**vars(fake_flash.flash3()), __spec__=SimpleNamespace(name="flash_attn_interface"))
    flash.installed.cache_clear()
    assert flash.installed(9) is None
    flash.installed.cache_clear()
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    assert isinstance(flash.installed(9), flash.Flash3)
    assert flash.installed(8) is None
    flash.installed.cache_clear()


def test_a_gpu_without_triton_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("fused.triton_", "fused.gpu"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delattr("fused.gpu", raising=False)
    with pytest.raises(ResourceError, match="Triton"):
        block._gpu()
