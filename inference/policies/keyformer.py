"""Key tokens by a noisy, flattened softmax (Keyformer, arXiv:2403.09054, section 3.3)."""

import torch
from torch import Tensor

from inference.policies.base import CacheShape, ScoredPolicy

START, END = 1.0, 2.0  # temperature of the score at the first and the last generated token (section 3.3.2)
HORIZON = 256  # generated tokens after which the temperature has reached its end


class Keyformer(ScoredPolicy):
    """As H2O, but a token's score is the sum of softmax((logits + Gumbel noise) / temperature).

    The noise stands for tokens that were discarded and could have mattered; a token has its own, drawn once from the
    text's seed, so that the same schedule of passes gives the same output.
    """

    recent_share = 0.3

    def __init__(self, shape: CacheShape, budget: float, prompt_tokens: int, seed: int, noise: float = 1.0) -> None:
        self._noise = noise
        super().__init__(shape, budget, prompt_tokens, seed)

    def reset(self) -> None:
        super().reset()
        self._generator = torch.Generator().manual_seed(self.seed)
        self._gumbel_LKT = torch.zeros_like(self.mass_LKT)
        self._known = [0] * self.shape.layers
        self._length = 0  # tokens that the first layer has seen

    def weights(self, layer: int, logits_KGST: Tensor) -> Tensor:
        tokens = logits_KGST.shape[3]
        self._length += logits_KGST.shape[2] if layer == 0 else 0
        generated = max(0, self._length - self.prompt_tokens)
        temperature = START + (END - START) * min(1.0, generated / HORIZON)
        noise_KT = self._draw(layer, tokens)
        return logits_KGST.add_(noise_KT[:, None, None, :tokens]).div_(temperature).softmax(-1)

    def forget(self, layer: int, keep_Kn: Tensor) -> None:
        super().forget(layer, keep_Kn)
        count = keep_Kn.shape[1]
        self._gumbel_LKT[layer, :, :count] = self._gumbel_LKT[layer].gather(1, keep_Kn)
        self._known[layer] = count

    def _draw(self, layer: int, tokens: int) -> Tensor:
        if tokens > self._gumbel_LKT.shape[2]:
            pad = tokens + tokens // 4 - self._gumbel_LKT.shape[2]
            self._gumbel_LKT = torch.nn.functional.pad(self._gumbel_LKT, (0, pad))
        known = self._known[layer]
        if tokens > known:
            uniform = torch.rand(self.shape.kv_heads, tokens - known, generator=self._generator).clamp_min(1e-10)
            self._gumbel_LKT[layer, :, known:tokens] = -self._noise * (-uniform.log()).log()
            self._known[layer] = tokens
        return self._gumbel_LKT[layer]
