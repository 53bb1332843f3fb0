"""What a key-value policy is: it decides which tokens of a text the cache keeps, or which of them attention reads."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

LEAST = 64  # tokens that are always kept: what is as short as this is computed exactly
SINKS = 4  # first tokens, which attention needs as a place to go (StreamingLLM, arXiv:2309.17453)
PROBE = 32  # last tokens of a prompt that look at every chunk of it before the chunk is evicted from


@dataclass(frozen=True)
class CacheShape:
    """Sizes of the cache that a policy works on."""

    layers: int
    kv_heads: int
    page_tokens: int


class KVPolicy:
    """The state of one text. ``budget`` is the share of its tokens that are kept (evicting) or read (selecting).

    At budget 1 nothing is evicted or left out, and outputs are those of full attention, token for token. The text is
    ``prompt_tokens`` long at first. Random choices follow from ``seed``.
    """

    evicts: ClassVar[bool] = False
    scores: ClassVar[bool] = False  # wants ``observe``
    selects: ClassVar[bool] = False  # wants ``select``

    def __init__(self, shape: CacheShape, budget: float, prompt_tokens: int, seed: int) -> None:
        self.shape, self.budget, self.prompt_tokens, self.seed = shape, budget, prompt_tokens, seed

    def limit(self, length: int) -> int:
        """Tokens to keep or read of a text that is ``length`` tokens long, or still reads its prompt."""
        length = max(length, self.prompt_tokens)
        return min(length, max(LEAST, int(self.budget * length)))

    def room(self, length: int) -> int:
        """The most tokens that the cache holds on the way to a text of ``length`` tokens."""
        most = self.limit(length)
        return min(length, most + max(self.shape.page_tokens, most // 10)) if self.evicts else length

    def reset(self) -> None:
        """The cache has been emptied; the text will be computed again."""

    def observe(self, layer: int, logits_KGST: Tensor, written: int) -> None:
        """Attention logits of one pass: S rows against all T tokens held, -inf where a row does not see a token.

        Only the first ``written`` tokens stay in the cache. ``logits_KGST`` may be overwritten.
        """

    def select(self, layer: int, q_SKGD: Tensor, keys: list[Tensor]) -> Tensor | None:
        """Which of the tokens in ``keys`` (parts [kv_heads, tokens, D], in order) the rows attend to: indices [n],
        or [kv_heads, n] for different ones in every head; None: all."""
        return None

    def compress(self, layer: int, keys_KTD: Tensor, values_KTD: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The ``count`` keys and values of a layer that stay, each [kv_heads, count, D]; copies."""
        raise AssertionError("this policy does not evict")

    def chunk(self, held: int, pending: int, rows: int) -> tuple[int, int]:
        """How many of ``pending`` prompt tokens the next pass computes, in at most ``rows`` rows, and how many of the
        prompt's last tokens look on (FINCH, arXiv:2408.00167, lets the question choose in the same way).

        An evicting policy reads a prompt in chunks that never let the cache grow a tenth above what it may hold.
        """
        count = min(pending, rows)
        most = self.limit(self.prompt_tokens)
        if not self.evicts or held + pending <= most:
            return count, 0
        room = max(self.shape.page_tokens, most + most // 10 - held)
        probe = min(PROBE, room // 2) if self.scores else 0
        count = max(1, min(count, rows - probe, room - probe))
        return count, min(probe, pending - count)


class ScoredPolicy(KVPolicy):
    """Keeps a score for every token of every layer and head, and the highest of them beside the most recent tokens."""

    evicts, scores = True, True
    recent_share: ClassVar[float]  # of the budget

    def __init__(self, shape: CacheShape, budget: float, prompt_tokens: int, seed: int) -> None:
        super().__init__(shape, budget, prompt_tokens, seed)
        self.reset()

    def reset(self) -> None:
        self.mass_LKT = torch.zeros(self.shape.layers, self.shape.kv_heads, 0)

    def observe(self, layer: int, logits_KGST: Tensor, written: int) -> None:
        self.mass_LKT = widened(self.mass_LKT, written)
        self.mass_LKT[layer, :, :written] += self.weights(layer, logits_KGST).sum((1, 2))[:, :written]

    def weights(self, layer: int, logits_KGST: Tensor) -> Tensor:
        """What each row adds to the tokens' scores, in the shape of the logits."""
        return logits_KGST.softmax(-1)

    def compress(self, layer: int, keys_KTD: Tensor, values_KTD: Tensor, count: int) -> tuple[Tensor, Tensor]:
        keep_Kn = self.keep(layer, keys_KTD.shape[1], count)
        self.forget(layer, keep_Kn)
        return taken(keys_KTD, keep_Kn), taken(values_KTD, keep_Kn)

    def keep(self, layer: int, held: int, count: int) -> Tensor:
        """Indices of the ``count`` tokens that stay, in order, [kv_heads, count]."""
        return heavy_and_recent(self.mass_LKT[layer, :, :held], count, round(self.recent_share * count))

    def forget(self, layer: int, keep_Kn: Tensor) -> None:
        """Let the scores follow the tokens that stay."""
        kept = self.mass_LKT[layer].gather(1, keep_Kn)
        self.mass_LKT[layer].zero_()
        self.mass_LKT[layer, :, : kept.shape[1]] = kept


def heavy_and_recent(score_KT: Tensor, count: int, recent: int) -> Tensor:
    """The last ``recent`` tokens and the best of those before them; [kv_heads, count] in order."""
    heads, held = score_KT.shape
    heavy = score_KT[:, : held - recent].topk(count - recent, dim=1).indices.sort(1).values
    return torch.cat((heavy, torch.arange(held - recent, held).expand(heads, -1)), 1)


def taken(x_KTD: Tensor, index_Kn: Tensor) -> Tensor:
    """Rows of every head by its own indices, [kv_heads, n, D]."""
    return x_KTD.gather(1, index_Kn[..., None].expand(-1, -1, x_KTD.shape[2]))


def widened(x_LKT: Tensor, length: int) -> Tensor:
    """With room for ``length`` tokens at least; new ones are 0."""
    missing = length - x_LKT.shape[2]
    if missing <= 0:
        return x_LKT
    return torch.nn.functional.pad(x_LKT, (0, max(missing, x_LKT.shape[2] // 4)))
