"""Calls whose like has been checked: what follows from sizes, strides and types is worked out once a signature.

Addresses are looked at in every call. What differs in anything, or lies otherwise, goes the long way again, and so does
whatever is not on a GPU.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attngen.runtime.prepared import remember
from attngen.serving.lone_kernel import ReadyLaunch
from attngen.torch_state import is_altered


@dataclass(frozen=True)
class KnownCall:
    """A call that has been checked.

    Attributes:
        launch: what it starts.
        units: on how many bytes each of the tensors that it passes starts.
        reach: how many bytes each spans.
        written: which of these are written to.
        neighbours: pairs of tensors of which one is written to and that span common bytes, with the distance at which
            they share none.
    """

    launch: ReadyLaunch
    units: tuple[int, ...]
    reach: tuple[int, ...]
    written: tuple[int, ...]
    neighbours: frozenset[tuple[int, int, int]]

    def takes(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Whether tensors may be read and written, where they lie, as those of the call that was checked."""
        addresses = [x.data_ptr() for x in tensors]
        for address, unit in zip(addresses, self.units, strict=True):
            if not address or address % unit:
                return False
        return all(pair in self.neighbours for pair in _neighbours(addresses, self.reach, self.written))


class KnownCalls:
    """The calls of an operation that have been checked, by what they pass but for addresses."""

    def __init__(self) -> None:
        self._known: dict[Any, KnownCall] = {}

    def find(self, key: Any, tensors: Iterable[torch.Tensor]) -> ReadyLaunch | None:
        """What a call of a signature starts, if that is known, and what it passes lies as it may."""
        known = None if key is None or is_altered() else self._known.get(key)
        return None if known is None or not known.takes(tensors) else known.launch

    def learn(
        self,
        key: Any,
        launch: ReadyLaunch,
        tensors: Mapping[str, torch.Tensor],
        units: Mapping[str, int],
        written: Collection[str] = (),
    ) -> None:
        """Remember a call that has been checked.

        Args:
            key: its signature; None where it has none.
            launch: what it starts.
            tensors: that it passes, by name, in the order in which addresses will come.
            units: on how many bytes those start that must.
            written: which of them are written to.
        """
        if key is None or is_altered():
            return
        reach = tuple(map(_bytes_spanned, tensors.values()))
        numbers = tuple(number for number, name in enumerate(tensors) if name in written)
        lie = frozenset(_neighbours([x.data_ptr() for x in tensors.values()], reach, numbers))
        if (before := self._known.get(key)) is not None:
            lie |= before.neighbours
        known = KnownCall(launch, tuple(units.get(name, 1) for name in tensors), reach, numbers, lie)
        remember(self._known, key, known)


def _bytes_spanned(x: torch.Tensor) -> int:
    """From the first byte of a tensor to its last."""
    reach = sum(step * (size - 1) for step, size in zip(x.stride(), x.shape, strict=True))
    return (reach + 1) * x.element_size() if x.numel() else 0


def _neighbours(
    addresses: list[int], reach: tuple[int, ...], written: tuple[int, ...]
) -> Iterator[tuple[int, int, int]]:
    """Pairs of tensors of which the first is written to and that span common bytes, and their distance."""
    for i in written:
        begin, end = addresses[i], addresses[i] + reach[i]
        for j, address in enumerate(addresses):
            if j != i and begin < address + reach[j] and address < end:
                yield i, j, address - begin


def signature_of(values: Iterable[Any]) -> Any:
    """What a call passes, but for addresses and the numbers in tensors; None where that is no key."""
    try:
        key = (*map(_described, values), torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        hash(key)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return None  # a sparse tensor, a list, an array
    return key


def _described(x: Any) -> Any:
    if not isinstance(x, torch.Tensor):
        return x.__class__, x  # True is no 1
    return (
        x.shape, x.stride(), x.dtype, x.get_device(), x.__class__, x.is_neg(), x.requires_grad, x.is_inference(),
        x.untyped_storage().nbytes(),
    )  # fmt: skip
