"""Root mean square layer normalisation (arXiv:1910.07467)."""

from torch import Tensor, nn

from fused.rows import rms_norm


class RMSNorm(nn.RMSNorm):
    """torch's, computed in fewer passes."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim, eps=eps)
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] to the same shape."""
        return rms_norm(x, self.weight, self._eps)
