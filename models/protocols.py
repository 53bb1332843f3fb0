"""What code outside may put in place of a part of the model."""

from typing import Protocol

from torch import Tensor


class AttentionCore(Protocol):
    """Causal attention between projected heads.

    The model calls it with whatever slice of the sequence it was given, so a core that knows about other ranks can
    attend over the whole sequence.
    """

    def __call__(self, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, document_ids_BS: Tensor | None, /) -> Tensor:
        """Attend with scale ``1 / sqrt(head_dim)``.

        Args:
            q_BSHD: rotated queries, [batch, sequence, heads, head_dim].
            k_BSKD: rotated keys, [batch, sequence, kv_heads, head_dim]; kv_heads divides heads, query head ``h``
                reads key-value head ``h // (heads / kv_heads)``.
            v_BSKD: values, shaped like the keys.
            document_ids_BS: a token attends to tokens with its own id only; negative ids are padding. None: all
                tokens are one document.

        Returns:
            [batch, sequence, heads, head_dim] in the dtype of the queries, finite on padding too.
        """
        ...
