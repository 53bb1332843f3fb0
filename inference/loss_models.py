"""Models that give token losses: this project's decoders, and what ``transformers`` reads (its folders, GGUF files).

Both answer the same two questions: the tokens of texts, and the bits of the scored tokens of packed windows. Softmax
in fp32 (fp64 for a model in fp64), results in fp64.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data.files import read_json
from data.preselect.ladder import model_files
from data.tokenize import SETTINGS, load_tokenizer
from inference.gguf_files import find_gguf, read_with_transformers
from inference.loss_rows import OnePassRotation, one_pass_norms, sum_exponentials
from inference.windows import Window
from models.attention import local_attention
from models.block import Block
from models.hf import load_hf
from models.hf_config import ARCHITECTURE, CONFIG, NEUTRAL

CHUNK_LOGITS = 2**19  # logits alive at once in our own head: 2 MB stay in the cache
PACK_LOGITS = 2**27  # logits of one forward pass of a model that gives them all
SAFE_LOGIT = 60.0  # its exponential, times a vocabulary of e^28, is a number in fp32
PROBE_TOLERANCE = 1e-4  # bits of a token; above it packed documents see each other, or may: then they are not packed
Bits = npt.NDArray[np.float64]


class LossModel(Protocol):
    """A causal language model ready to score."""

    context: int  # tokens that it is made for
    begin: list[int]  # what it reads before a document's first token
    parameters: int

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...

    def bits(self, windows: Sequence[Window]) -> list[Bits]:
        """Bits of the scored tokens of each window; the windows are read in one pass and do not see each other."""
        ...

    def row_tokens(self, most: int) -> int:
        """How many tokens one pass may hold where the caller would give it ``most``."""
        ...


def load_loss_model(path: str | Path) -> LossModel:
    """The model of a folder or a GGUF file, on the CPU.

    A Llama without options that change its arithmetic is read by this project's decoder; all else by ``transformers``.

    Raises:
        DataError: it cannot be read, by whom and why.
    """
    path = Path(path).expanduser()
    model_files(path)
    gguf = find_gguf(path)
    if gguf is not None:
        return TransformersModel(gguf.parent, gguf.name)
    config = read_json(path / CONFIG)
    config = config if isinstance(config, dict) else {}
    plain = all(config.get(key) in neutral for key, neutral in NEUTRAL.items())
    if plain and config.get("architectures") == [ARCHITECTURE] and (path / "tokenizer.json").is_file():
        return DecoderModel(path)
    return TransformersModel(path)


class DecoderModel:
    """One of this project's decoders; attention runs document by document, so no mask is built or computed."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.model = load_hf(folder, dtype).eval()
        one_pass_norms(self.model)
        self.longest = float(self.model.head.weight.detach().double().norm(dim=1).max())  # row of the head
        self.tokenizer = load_tokenizer(folder)
        self.context, self.parameters = self.model.spec.context, self.model.spec.parameters()
        settings: Any = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
        bos = settings.get("bos_token")
        found = self.tokenizer.fast.token_to_id(str(bos["content"] if isinstance(bos, dict) else bos)) if bos else None
        self.begin = [self.tokenizer.eos_id if found is None else found]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer.encode_batch(texts)

    def row_tokens(self, most: int) -> int:
        return most

    @torch.inference_mode()
    def bits(self, windows: Sequence[Window]) -> list[Bits]:
        tokens, positions, rows, targets = _flat(windows)
        runs = [(length, len(list(same))) for length, same in itertools.groupby(len(w.tokens) - 1 for w in windows)]

        def each_alone(q: Tensor, k: Tensor, v: Tensor, _: Tensor | None) -> Tensor:
            """[1, S, heads, dim]: causal attention inside every window, equal lengths as one batch."""
            out, place = torch.empty_like(q), 0
            for length, count in runs:
                part = slice(place, place + length * count)
                q_, k_, v_ = (x[0, part].unflatten(0, (count, length)) for x in (q, k, v))
                out[0, part] = local_attention(q_, k_, v_, None).flatten(0, 1)
                place += length * count
            return out

        self.model.set_attention_core(each_alone)
        hidden_NE = self._hidden(tokens, positions, rows)
        most = self.longest * float(hidden_NE.square().sum(1).max().sqrt())  # no logit is larger
        weight_VE = self.model.head.weight
        logits = hidden_NE.new_empty(max(1, CHUNK_LOGITS // weight_VE.shape[0]), weight_VE.shape[0])
        parts = zip(hidden_NE.split(len(logits)), targets.split(len(logits)), strict=True)
        found = [
            _token_bits(torch.mm(part, weight_VE.T, out=logits[: len(part)]), labels, most) for part, labels in parts
        ]
        return _split(found, windows)

    def _hidden(self, tokens: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        """``Decoder.hidden`` of some places, [N, dim]; what no other place reads is computed for them alone."""
        batch, x_BSE = self.model.describe(tokens, positions), self.model.embed(tokens)
        batch = replace(batch, turn=OnePassRotation(batch.turn.cos, batch.turn.sin))
        for layer in self.model.layers[:-1]:
            x_BSE = layer(x_BSE, batch)
        last = self.model.layers[-1]
        assert isinstance(last, Block)
        return self.model.norm(last.feed(last.attend(x_BSE, batch)[:, rows], batch))[0]


class TransformersModel:
    """Any causal language model of ``transformers``, from its folder or from a GGUF file, in fp32.

    Windows share a row where the model keeps packed documents apart (positions that start again mark them); a probe at
    loading decides. Where it does not (recurrent layers, say), only windows of equal length share a pass.
    """

    def __init__(self, folder: Path, gguf: str = "") -> None:
        self.tokenizer, self.model = read_with_transformers(folder, gguf)
        config = self.model.config
        self.context = int(getattr(config, "max_position_embeddings", None) or 2048)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        start = self.tokenizer.bos_token_id
        start = self.tokenizer.eos_token_id if start is None else start
        self.begin = [] if start is None else [int(start)]
        self.packs = self._keeps_packed_apart()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

    def row_tokens(self, most: int) -> int:
        return max(1, min(most, PACK_LOGITS // self.model.config.vocab_size))

    def bits(self, windows: Sequence[Window]) -> list[Bits]:
        if self.packs:
            return self._pass(windows)
        result: list[Bits] = []
        for _, same in itertools.groupby(windows, lambda window: len(window.tokens)):
            result += self._batch(list(same))
        return result

    @torch.inference_mode()
    def _pass(self, windows: Sequence[Window]) -> list[Bits]:
        tokens, positions, rows, targets = _flat(windows)
        logits = self.model(input_ids=tokens, position_ids=positions, use_cache=False).logits[0]
        return _split([_token_bits(logits[rows], targets)], windows)

    @torch.inference_mode()
    def _batch(self, windows: Sequence[Window]) -> list[Bits]:
        """Windows of one length as a rectangle."""
        tokens = torch.tensor([window.tokens for window in windows])
        logits = self.model(input_ids=tokens[:, :-1], use_cache=False).logits
        return [
            _token_bits(row[len(row) - window.scored :], labels[len(labels) - window.scored :]).numpy()
            for row, labels, window in zip(logits, tokens[:, 1:], windows, strict=True)
        ]

    def _keeps_packed_apart(self) -> bool:
        ids = [index % self.model.config.vocab_size for index in range(3, 40)]
        probe = [Window(0, ids[:24], 23), Window(1, ids[24:], 12), Window(2, ids[5:14], 8)]
        try:
            together = self._pass(probe)
        except (TypeError, ValueError, RuntimeError):  # no position_ids, or positions that do not fit
            return False
        alone = [self._batch([window])[0] for window in probe]
        return all(np.abs(a - b).max() < PROBE_TOLERANCE for a, b in zip(together, alone, strict=True))


def _flat(windows: Sequence[Window]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens and positions [1, S] of windows in a row, and the rows and targets [N] of what they score."""
    each = [np.array(window.tokens, dtype=np.int64) for window in windows]
    lengths, scored = np.array([[len(tokens) - 1, w.scored] for tokens, w in zip(each, windows, strict=True)]).T
    places = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    rows = np.flatnonzero(places >= np.repeat(lengths - scored, lengths))
    tokens = np.concatenate([tokens[:-1] for tokens in each])
    targets = np.concatenate([tokens[1:] for tokens in each])[rows]
    here, where, which, wanted = map(torch.from_numpy, (tokens[None], places[None], rows, targets))
    return here, where, which, wanted


def _token_bits(logits_NV: Tensor, targets: Tensor, most: float = math.inf) -> Tensor:
    """Bits of each target, fp64; uses up the logits: cross_entropy would write its log-softmax beside them.

    Where no logit is larger than ``most`` and that is small enough for a sum of exponentials, the largest is not
    subtracted: two passes less.
    """
    wide = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    picked = wide.gather(1, targets[:, None]).double()
    if most <= SAFE_LOGIT:
        sums = sum_exponentials(wide) if wide.dtype == torch.float32 else wide.exp_().sum(1)
        return (sums.log_() - picked[:, 0]) / math.log(2)
    largest = wide.amax(1, keepdim=True)
    nats = wide.sub_(largest).exp_().sum(1, keepdim=True).double().log_() + (largest.double() - picked)
    return nats[:, 0] / math.log(2)


def _split(parts: Sequence[Tensor], windows: Sequence[Window]) -> list[Bits]:
    counts = [window.scored for window in windows]
    return [part.numpy() for part in torch.cat(list(parts)).split(counts)]
