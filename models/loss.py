"""Cross-entropy of a linear head without keeping the logits of the whole batch."""

from typing import Any

import torch
from torch import Tensor

from conf.estimate import LOGIT_CHUNK, logit_rows
from fused.products import product

IGNORE = -100  # label of a position that has no target


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of token losses, and each of them; the gradients are formed with the loss, chunk by chunk, so nothing is
    recomputed."""

    @staticmethod
    def forward(ctx: Any, hidden_NE: Tensor, weight_VE: Tensor, labels_N: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(hidden_NE.dtype, torch.float32)
        each_N = torch.empty(labels_N.shape, dtype=exact, device=hidden_NE.device)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_NE) if want_hidden else None
        grad_weight = torch.zeros_like(weight_VE, dtype=exact) if want_weight else None
        for start in range(0, hidden_NE.shape[0], rows):
            part, labels = hidden_NE[start : start + rows], labels_N[start : start + rows]
            logits = product(part, weight_VE.T).to(exact)
            kept = labels != IGNORE
            targets = labels.where(kept, 0)[:, None]
            # In place and with one exponential: these passes over the logits cost as much as a product.
            exponentials = logits.sub_(logits.amax(dim=-1, keepdim=True))
            target = exponentials.gather(1, targets)
            sums = exponentials.exp_().sum(dim=-1, keepdim=True)
            each_N[start : start + rows] = (sums.log() - target)[:, 0].where(kept, 0.0)
            if grad_hidden is None and grad_weight is None:
                continue
            # d loss / d logits = softmax - one_hot(label), zero where there is no label
            scale = kept[:, None].to(exact)
            grad = exponentials.mul_(scale / sums).scatter_add_(1, targets, -scale).to(hidden_NE.dtype)
            if grad_hidden is not None:
                product(grad, weight_VE, out=grad_hidden[start : start + rows])
            if grad_weight is not None and grad_weight.dtype == grad.dtype:
                grad_weight.addmm_(grad.T, part)
            elif grad_weight is not None:
                grad_weight += grad.T @ part
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight_VE.dtype))
        ctx.mark_non_differentiable(each_N)
        return each_N.sum(), each_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scaled = [None if g is None else g * grads[0].to(g.dtype) for g in (grad_hidden, grad_weight)]
        return scaled[0], scaled[1], None, None


def linear_cross_entropy(
    hidden_NE: Tensor, weight_VE: Tensor, labels_N: Tensor, chunk_logits: int = LOGIT_CHUNK
) -> tuple[Tensor, Tensor]:
    """The sum over rows of ``cross_entropy(hidden @ weight.T, label)``, and [rows] each of them (without gradient), in
    fp32 (fp64 for fp64 inputs).

    Rows whose label is ``IGNORE`` count nothing. Under autocast the products run in the autocast dtype; the softmax
    and the sums are always in fp32 at least.

    Args:
        hidden_NE: [rows, dim].
        weight_VE: [vocabulary, dim].
        labels_N: [rows], int64.
        chunk_logits: the most logits that are alive at once.
    """
    device = hidden_NE.device.type
    if torch.is_autocast_enabled(device):
        low = torch.get_autocast_dtype(device)
        hidden_NE, weight_VE = hidden_NE.to(low), weight_VE.to(low)
    rows = logit_rows(weight_VE.shape[0], cpu=device == "cpu", chunk=chunk_logits)
    with torch.autocast(device, enabled=False):
        total, each_N = _LinearCrossEntropy.apply(hidden_NE, weight_VE, labels_N, rows)  # pyright: ignore
    return total, each_N
