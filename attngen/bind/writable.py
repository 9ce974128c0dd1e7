"""Whether a tensor can be written to. A kernel writes by address, so nothing of torch's would stop it."""

from pathlib import Path

import torch

from attngen.bind.tensors import check_plain
from attngen.errors import ArgumentError

_MAPS = Path("/proc/self/maps")
"""Linux's list of what this process has mapped: `7f52-7f53 r--p ...`."""


def check_writable(name: str, out: torch.Tensor) -> None:
    """Refuse a tensor for a result that has no memory to write to, or none that may be written.

    Raises:
        ArgumentError: it is no dense tensor, an inference tensor outside of that mode, a view that negates, without
            storage, or memory that is mapped for reading alone.
    """
    allocate = "pass memory of torch.empty, or none"
    if out.is_neg():
        raise ArgumentError(name, "a view that negates what it shows", "a plain tensor", allocate)
    check_plain(name, out)
    if out.is_inference() and not torch.is_inference_mode_enabled():
        must = "a tensor that may be written outside of inference mode"
        raise ArgumentError(name, "an inference tensor", must, "call under torch.inference_mode()")
    if not out.numel() or out.is_meta:  # a meta tensor asks what a launch would be
        return
    reach = sum(step * (size - 1) for step, size in zip(out.stride(), out.shape, strict=True))
    last = (out.storage_offset() + reach + 1) * out.element_size()
    if out.untyped_storage().nbytes() < last:
        raise ArgumentError(
            name, "a tensor whose storage was freed in part", f"{last} bytes of storage", allocate
        )
    if out.device.type == "cpu" and not _is_mapped_for_writing(out.data_ptr()):
        raise ArgumentError(name, "memory that can only be read", "memory that can be written", allocate)


def _is_mapped_for_writing(address: int) -> bool:
    """Whether a page may be written to, such as none of a file that was mapped for reading; True if none can tell."""
    try:
        lines = _MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return True
    for line in lines:
        pages, rights, *_ = line.split(maxsplit=2)
        first, end = (int(bound, 16) for bound in pages.split("-"))
        if first <= address < end:
            return rights[1] == "w"
    return True
