"""Sums that a rank holds for some owner's chunks while blocks and messages are added to them."""

from collections.abc import Callable

from torch import Tensor

from parallel.ring.schedule import Parts

# How a sum's tensors [batch, tokens, ...] take on others that cover the same tokens, and what each holds before any.
Add = Callable[[list[Tensor], list[Tensor]], None]


def narrow(tensors: list[Tensor], held: Parts, wanted: Parts) -> list[Tensor]:
    """The tokens of ``wanted`` out of tensors that hold ``held``; views."""
    if held == wanted:
        return tensors
    assert held.covers(wanted), f"chunks {wanted} are not among those at hand, {held}"
    length = tensors[0].shape[1] // len(held)
    return [x[:, (wanted.start - held.start) * length : (wanted.stop - held.start) * length] for x in tensors]


class Sum:
    """One running sum. It takes over the first tensors that it is given and grows when others reach further."""

    def __init__(self, parts: Parts, tensors: list[Tensor], add: Add, empty: tuple[float, ...]) -> None:
        self.parts, self.tensors = parts, tensors
        self._add, self._empty = add, empty

    def view(self, parts: Parts) -> list[Tensor] | None:
        """The part of the sum that covers ``parts``, to be added to in place; None if it does not reach that far."""
        return narrow(self.tensors, self.parts, parts) if self.parts.covers(parts) else None

    def add(self, parts: Parts, tensors: list[Tensor]) -> None:
        if not self.parts.covers(parts):
            if parts.covers(self.parts) and all(x.dtype == y.dtype for x, y in zip(tensors, self.tensors, strict=True)):
                # What came in reaches further: add our smaller part to it.
                parts, self.parts = self.parts, parts
                tensors, self.tensors = self.tensors, tensors
            else:
                self._grow(self.parts.union(parts))
        self._add(narrow(self.tensors, self.parts, parts), tensors)

    def _grow(self, parts: Parts) -> None:
        length = self.tensors[0].shape[1] // len(self.parts)
        grown = [
            x.new_full((x.shape[0], len(parts) * length, *x.shape[2:]), value)
            for x, value in zip(self.tensors, self._empty, strict=True)
        ]
        for whole, x in zip(narrow(grown, parts, self.parts), self.tensors, strict=True):
            whole.copy_(x)
        self.parts, self.tensors = parts, grown


def add_plain(total: list[Tensor], part: list[Tensor]) -> None:
    """Gradients: a plain sum."""
    for x, y in zip(total, part, strict=True):
        x.add_(y)
