"""Whether memory for results is nobody else's."""

from collections.abc import Mapping

import torch

from attngen.errors import ArgumentError


def check_overlap(name: str, written: torch.Tensor, others: Mapping[str, torch.Tensor]) -> None:
    """Refuse memory for a result two of whose elements may be one, or that may share memory with another tensor.

    Dimensions sorted by stride must nest: each stride at least spans what the smaller ones reach. Another tensor may
    lie between its rows only where both step through memory with the same strides (slices of one packed tensor) and
    neither row reaches into the other's.

    Raises:
        ArgumentError: it overlaps itself or another.
    """
    if written.numel() == 0:
        return
    if not written.is_contiguous():
        _check_nesting(name, written)
    first, last = _span(written)
    for other, x in others.items():
        begin, end = _span(x)
        if begin < last and first < end and not _interleaved(written, x):
            raise ArgumentError(name, f"memory shared with {other}", "memory of its own")


def _check_nesting(name: str, written: torch.Tensor) -> None:
    reach = 1
    dims = [(step, size) for step, size in zip(written.stride(), written.shape, strict=True) if size > 1]
    for step, size in sorted(dims):
        if step < reach:
            raise ArgumentError(
                name, f"strides {tuple(written.stride())}", "a tensor that does not overlap itself"
            )
        reach += step * (size - 1)


def extent(x: torch.Tensor) -> int:
    """Bytes from the first element to behind the last; 0 where there is none."""
    if x.is_contiguous():  # as most are, in calls that look at each tensor several times
        return x.nbytes
    reach = sum(step * (size - 1) for step, size in zip(x.stride(), x.shape, strict=True))
    return (reach + 1) * x.element_size() if x.numel() else 0


def _span(x: torch.Tensor) -> tuple[int, int]:
    begin = x.data_ptr()
    return begin, begin + extent(x)


def _interleaved(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are provably disjoint slices of one packed tensor.

    They are where, for the stride of some dimension, both keep to parts of their own within one step of it.
    """
    if a.stride() != b.stride() or a.element_size() != b.element_size():
        return False
    steps = {step for x in (a, b) for step, size in zip(x.stride(), x.shape, strict=True) if size > 1}
    offset = b.data_ptr() - a.data_ptr()
    for step in steps:
        period = step * a.element_size()
        if period and all(larger % step == 0 for larger in steps if larger > step):
            ahead = offset % period
            if _reach_within(a, step) <= ahead and ahead + _reach_within(b, step) <= period:
                return True
    return False


def _reach_within(x: torch.Tensor, step: int) -> int:
    """Bytes that the dimensions of smaller stride than `step` span."""
    dims = zip(x.stride(), x.shape, strict=True)
    return (1 + sum(inner * (size - 1) for inner, size in dims if inner < step)) * x.element_size()
