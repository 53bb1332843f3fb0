"""The first few tokens and the last ones (StreamingLLM, arXiv:2309.17453, section 3.2): what others have to beat."""

import torch
from torch import Tensor

from inference.policies.base import SINKS, KVPolicy


class SinksRecency(KVPolicy):
    """Evicts the middle. Keys keep the rotation of their own positions."""

    evicts = True

    def compress(self, layer: int, keys_KTD: Tensor, values_KTD: Tensor, count: int) -> tuple[Tensor, Tensor]:
        held = keys_KTD.shape[1]
        keep = torch.cat((torch.arange(SINKS), torch.arange(held - count + SINKS, held)))
        return keys_KTD[:, keep], values_KTD[:, keep]
