"""One forward pass over the rows of a step: prompts' chunks, single tokens and drafts side by side, nothing padded.

The rows of all texts are one matrix [rows, dim]; only attention looks at which text a row belongs to (prepacking,
arXiv:2404.09529, without its mask). Weights that read the same input are one matrix. The rotation is one complex
product: the rows of the query and key weights are reordered so that a pair's two features are neighbours, which leaves
every score as it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from conf.errors import ConfigError
from conf.serving import EngineConfig
from inference import few_rows
from inference.few_rows import FEW_ROWS, Array, Reaches
from inference.paged_attention import PagedCache, StepAttention
from inference.scheduler import Span
from inference.skip_decode import active_layers
from inference.weights import linear
from models.block import Block
from models.decoder import Decoder
from models.hf import load_hf
from models.mlp import SwiGLU
from models.moe.exchange import Tokens
from models.rope import inverse_frequencies, turn
from models.spec import ModelSpec


@dataclass
class Result:
    """What a step computed: for each span its logits' rows (None: none wanted) and, for embeddings, hidden states."""

    logits: list[Tensor | None]
    hidden: list[Tensor | None]


# The attention of all rows in one layer: its number, queries [rows, kv_heads, group, D], keys and values
# [rows, kv_heads, D]; returns [rows, heads * D].
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass
class _Few:
    """What compiled loops need to know of the rows."""

    turns: Array
    slots: Array
    reaches: Reaches | None  # where all rows attend over slots of the cache alone


@dataclass
class _Step:
    """What every layer needs to know of the rows."""

    turn_T1D: Tensor  # complex
    slots_T: Tensor
    attend: Attend
    cache: PagedCache
    tokens: Tokens | None  # for experts
    few: _Few | None  # where the rows are few


class ModelRunner:
    """A decoder's weights in the form that serving reads them in. The decoder given is used up."""

    def __init__(self, model: Decoder, form: str, pack: bool) -> None:
        self.spec = spec = model.spec
        self.dtype = torch.bfloat16 if form == "bf16" else torch.float32
        self._embedding = _own(model.embed.weight, self.dtype)
        self._layers = []
        for index in range(spec.layers):
            block = model.layers[index]
            if type(block) is not Block:
                rule = "mixture of depths is not served: which keys a token sees would depend on the layer"
                raise ConfigError("model.depth", spec.depth, rule, "serve a model that was trained with model.depth=1")
            self._layers.append(_Layer(block, spec, self.dtype, form, pack))
            model.layers[index] = torch.nn.Identity()  # its memory is free before the next one is made
        self._model = model if spec.routed else None  # describes tokens for experts
        self._norm = _Norm(model.norm, self.dtype)
        tied = model.head.weight is model.embed.weight
        # Logits bear 4 bits worse than any other product.
        head_form = "int8" if form == "int4" else form
        self._head = linear(self._embedding if tied else _own(model.head.weight, self.dtype), None, head_form, pack)
        self.frequencies = inverse_frequencies(spec.head_dim, spec.rope)
        if self.dtype == torch.float32:
            few_rows.warm_up()

    @torch.inference_mode()
    def run(self, spans: Sequence[Span], cache: PagedCache) -> Result:
        """Compute the spans' tokens, whose pages are there, and write their keys and values.

        Spans that use the same layers are one pass.
        """
        passes: dict[tuple[int, ...], list[int]] = {}
        for index, span in enumerate(spans):
            passes.setdefault(tuple(active_layers(span.generation, self.spec.layers)), []).append(index)
        rows: dict[int, Tensor] = {}
        for layers, members in passes.items():
            mine = [spans[index] for index in members]
            tokens, positions, slots = [], [], []
            for span in mine:
                tokens += span.tokens
                positions += span.positions
                slots += span.generation.slots(span.place, len(span.tokens), cache.page_tokens)
            attend = StepAttention(cache, mine, self.dtype)
            x_TE = self.forward(tokens, positions, slots, attend, cache, layers)
            rows.update(zip(members, x_TE.split(attend.sizes), strict=True))
        return self.results(spans, [rows[index] for index in range(len(spans))])

    def forward(
        self,
        tokens: list[int],
        positions: list[int],
        slots: list[int],
        attend: Attend,
        cache: PagedCache,
        layers: Sequence[int] = (),
    ) -> Tensor:
        """What the last norm reads, [rows, dim]; the rows' keys and values go to ``slots`` of the cache.

        ``layers`` are those that compute; empty: all.
        """
        step = self._step(tokens, positions, slots, attend, cache)
        x_TE = F.embedding(torch.tensor(tokens, dtype=torch.int64), self._embedding)
        for index in layers or range(self.spec.layers):
            if isinstance(attend, StepAttention) and (rows := attend.flow(index, x_TE)) is not None:
                x_TE, step = rows.x_TE, self._step(rows.tokens, rows.positions, rows.slots, attend, cache)
            x_TE = self._layers[index](index, x_TE, step)
        return x_TE

    def _step(
        self, tokens: list[int], positions: list[int], slots: list[int], attend: Attend, cache: PagedCache
    ) -> "_Step":
        turn_T1D = turn(torch.tensor(positions), self.frequencies)[:, None]
        described = None
        if self._model is not None:
            described = self._model.describe(torch.tensor(tokens)[None], torch.tensor(positions)[None]).tokens
        slots_T, few = torch.tensor(slots, dtype=torch.int64), None
        if self.dtype == torch.float32 and len(slots) <= FEW_ROWS:
            reaches = attend.short if isinstance(attend, StepAttention) else None
            few = _Few(turn_T1D.numpy(), slots_T.numpy(), reaches)
        return _Step(turn_T1D, slots_T, attend, cache, described, few)

    def results(self, spans: Sequence[Span], parts: Sequence[Tensor]) -> Result:
        """What the spans' texts ask for, from the rows of each: the last are those that were computed to the end."""
        logits: list[Tensor | None] = [None] * len(spans)
        hidden: list[Tensor | None] = [None] * len(spans)
        wanted: list[tuple[int, int]] = []  # (span, rows)
        kept = []
        for index, (span, rows_SE) in enumerate(zip(spans, parts, strict=True)):
            if span.generation.task == "embed":
                hidden[index] = self._norm(rows_SE)
                continue
            if rows := wanted_rows(span):
                wanted.append((index, rows))
                behind = len(rows_SE) - span.probes
                kept.append(rows_SE[behind - rows : behind])
        if kept:
            logits_RV = self._head(self._norm(torch.cat(kept))).float()
            split = logits_RV.split([rows for _, rows in wanted])
            for (index, _), part in zip(wanted, split, strict=True):
                logits[index] = part
        return Result(logits, hidden)


def load_runner(folder: str | Path, settings: EngineConfig) -> ModelRunner:
    """The model of a folder, ready to serve. Raises DataError as ``load_hf``, ConfigError as ``ModelRunner``."""
    model = load_hf(folder, torch.bfloat16 if settings.dtype == "bf16" else torch.float32).eval()
    return ModelRunner(model, settings.dtype, settings.pack)


class _Norm:
    """RMSNorm (arXiv:1910.07467) in fp32."""

    def __init__(self, norm: torch.nn.RMSNorm, dtype: torch.dtype) -> None:
        assert norm.weight is not None
        self._weight, self._eps = _own(norm.weight, dtype), norm.eps or 0.0
        self._array = self._weight.numpy() if dtype == torch.float32 else None
        self._number = np.float32(self._eps)

    def __call__(self, x: Tensor) -> Tensor:
        if self._array is not None and x.ndim == 2 and len(x) <= FEW_ROWS:
            return few_rows.norm(x, self._array, self._number)
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(self._eps))
        return (wide * scale).to(x.dtype) * self._weight

    def of_sum(self, x_TE: Tensor, more_TE: Tensor) -> tuple[Tensor, Tensor]:
        """The sum, and its norm."""
        if self._array is not None and len(x_TE) <= FEW_ROWS:
            return few_rows.add_and_norm(x_TE, more_TE, self._array, self._number)
        x_TE = x_TE + more_TE
        return x_TE, self(x_TE)


class _Layer:
    """One block: attention and feed-forward, each behind a norm and inside a residual connection."""

    def __init__(self, block: Block, spec: ModelSpec, dtype: torch.dtype, form: str, pack: bool) -> None:
        attention = block.attention
        self._heads, self._kv_heads, self._width = spec.heads, spec.kv_heads, spec.head_dim
        self._group = spec.heads // spec.kv_heads
        pairs = torch.arange(spec.head_dim).view(2, -1).T.flatten()  # feature i next to feature i + D / 2

        def paired(weight: Tensor) -> Tensor:
            return weight.unflatten(0, (-1, spec.head_dim))[:, pairs].flatten(0, 1)

        def joined(parts: Sequence[Tensor]) -> Tensor:
            return torch.cat([paired(parts[0]), paired(parts[1]), parts[2]]).detach().to(dtype)

        projections = (attention.q, attention.k, attention.v)
        biases = [p.bias for p in projections if p.bias is not None]
        weight = joined([p.weight for p in projections])
        self._qkv = linear(weight, joined(biases) if biases else None, form, pack)
        self._out = _module(attention.out, dtype, form, pack)
        self._attention_norm, self._mlp_norm = (_Norm(n, dtype) for n in (block.attention_norm, block.mlp_norm))
        norms = [norm for norm in (attention.q_norm, attention.k_norm) if isinstance(norm, torch.nn.RMSNorm)]
        self._head_norms = tuple(_paired_norm(norm, pairs, dtype) for norm in norms)
        self._post_norm = block.post_norm
        self._experts = None
        if isinstance(block.mlp, SwiGLU):
            both = torch.cat((block.mlp.gate.weight, block.mlp.up.weight)).detach().to(dtype)
            self._gate_up = linear(both, None, form, pack)
            self._down = _module(block.mlp.down, dtype, form, pack)
        else:
            self._experts = block.mlp.to(dtype)

    def __call__(self, index: int, x_TE: Tensor, step: _Step) -> Tensor:
        """[rows, dim] to the same shape; keys and values go to the cache."""
        if self._post_norm:
            x_TE = x_TE + self._attention_norm(self._attend(index, x_TE, step))
            return x_TE + self._mlp_norm(self._feed(x_TE, step))
        attended_TE = self._attend(index, self._attention_norm(x_TE), step)
        x_TE, normed_TE = self._mlp_norm.of_sum(x_TE, attended_TE)
        return x_TE + self._feed(normed_TE, step)

    def _attend(self, index: int, x_TE: Tensor, step: _Step) -> Tensor:
        heads, kv_heads = self._heads, self._kv_heads
        qkv_THD = self._qkv(x_TE).view(x_TE.shape[0], -1, self._width)
        if self._head_norms:
            for norm, rows_TND in zip(self._head_norms, qkv_THD.split((heads, kv_heads, kv_heads), 1), strict=False):
                rows_TND.copy_(norm(rows_TND))
        if step.few is not None:
            store, turns, slots = step.cache.array(index), step.few.turns, step.few.slots
            if step.few.reaches is not None:
                return self._out(step.few.reaches.turn_keep_attend(qkv_THD, turns, store, slots))
            few_rows.turn_and_keep(qkv_THD, turns, store, slots)
        else:
            _rotate(qkv_THD[:, : heads + kv_heads], step.turn_T1D)
            step.cache.write(index, step.slots_T, qkv_THD[:, heads:])
        q_THD, k_TKD, v_TKD = qkv_THD.split((heads, kv_heads, kv_heads), 1)
        q_TKGD = q_THD.unflatten(1, (kv_heads, self._group))
        return self._out(step.attend(index, q_TKGD, k_TKD, v_TKD))

    def _feed(self, x_TE: Tensor, step: _Step) -> Tensor:
        if self._experts is not None:
            assert step.tokens is not None
            return self._experts(x_TE[None], step.tokens)[0]
        both_TF = self._gate_up(x_TE)
        if both_TF.dtype == torch.float32 and len(x_TE) <= FEW_ROWS:
            return self._down(few_rows.gated(both_TF))
        gate_TF, up_TF = both_TF.chunk(2, 1)
        return self._down(F.silu(gate_TF).mul_(up_TF))


def _module(layer: torch.nn.Linear, dtype: torch.dtype, form: str, pack: bool):
    bias = None if layer.bias is None else _own(layer.bias, dtype)
    return linear(_own(layer.weight, dtype), bias, form, pack)


def _own(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy: one view of the file that the model was read from would hold all of it in memory."""
    return weight.detach().to(dtype, copy=True)


def _paired_norm(norm: torch.nn.RMSNorm, pairs: Tensor, dtype: torch.dtype) -> _Norm:
    found = _Norm(norm, dtype)
    found._weight = found._weight[pairs]
    return found


def _rotate(x_THD: Tensor, turn_T1D: Tensor) -> None:
    """Turn neighbouring pairs of features in place (RoFormer, arXiv:2104.09864, section 3.4.2)."""
    if x_THD.dtype == torch.float32:
        torch.view_as_complex(x_THD.unflatten(2, (-1, 2))).mul_(turn_T1D)
    else:
        turned = torch.view_as_complex(x_THD.float().unflatten(2, (-1, 2))) * turn_T1D
        x_THD.copy_(torch.view_as_real(turned).flatten(2))


def wanted_rows(span: Span) -> int:
    """How many of a span's last rows, but for probes, its text needs the results of."""
    if span.parents is not None or span.generation.params.prompt_logprobs or span.generation.task == "embed":
        return span.count
    return int(span.last)
