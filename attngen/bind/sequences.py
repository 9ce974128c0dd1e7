"""How many sequences a call has and how long they may be, from the shapes of what says their lengths.

The numbers themselves lie in device memory and are never read here.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch

from attngen.bind.numbers import scalar_of
from attngen.bind.page_arguments import page_sizes
from attngen.bind.tensors import check_plain
from attngen.errors import ArgumentError
from attngen.plan import ANY_LENGTH, BLOCK_TABLE, LENGTHS, LETTERS, LengthArgument, Manifest

MOST_SEQUENCES = 2**22
"""Kernels count the rows of all sequences, each padded to whole blocks of 128, in an i32."""


def sequence_sizes(manifest: Manifest, sizes: Mapping[str, int], passed: Mapping[str, Any]) -> dict[str, int]:
    """The sizes of a call that follow from its lengths: batch and, of ragged sequences, seqlen_q and seqlen_k.

    Where keys are paged, also those that follow from its table (`page_sizes`).

    Args:
        manifest: of the call.
        sizes: that follow from q, k and v: tokens_q and tokens_k of ragged sequences, pages and their rows of paged
            ones, batch and lengths of others.
        passed: what the call passes by name.

    Raises:
        ArgumentError: what says a length is no contiguous row of integers, or two tell of different batches.
    """
    found: dict[str, int] = {}
    said_by = "q" if manifest.lengths.queries != "ragged" else "k"
    if "batch" in sizes:
        found["batch"] = sizes["batch"]
    for each in manifest.lengths.arguments:
        x = passed.get(each.name)
        if x is None and each.is_optional:
            continue
        batch = _count(each, x)
        if "batch" not in found:
            found["batch"], said_by = batch, each.name
        if found["batch"] != batch:
            more = 1 if each.is_cumulative else 0
            must = f"{found['batch'] + more}, as {said_by} has {found['batch']} sequences"
            raise ArgumentError(each.name, f"{batch + more} elements", must)
    if found["batch"] > MOST_SEQUENCES:
        raise ArgumentError(
            said_by, f"{found['batch']:,} sequences", f"at most {MOST_SEQUENCES:,}", "split the batch"
        )
    for axis, letter in LETTERS.items():
        if manifest.lengths.is_by_token(axis):
            name = f"max_seqlen_{letter}"
            bound = bound_of_lengths(name, passed.get(name, ANY_LENGTH))
            found[LENGTHS[axis]] = min(bound, sizes[f"tokens_{letter}"])
    if manifest.lengths.is_paged("keys"):
        found |= page_sizes(sizes, found["batch"], said_by, passed)
    return found


def bound_of_lengths(name: str, value: Any) -> int:
    """The bound of lengths that a call passes.

    Raises:
        ArgumentError: it is no length.
    """
    bound = int(scalar_of(name, "i32", value))
    if bound < 0:
        raise ArgumentError(name, str(bound), "the length of the longest sequence, or more", "leave it out")
    return bound


def check_lengths(manifest: Manifest, sizes: Mapping[str, int], passed: Mapping[str, Any]) -> None:
    """Read what a call says of its lengths, which synchronises, and refuse what no tensor has.

    Args:
        manifest: of the call.
        sizes: of the call.
        passed: its tensors, by the names of their values.

    Raises:
        ArgumentError: a sequence begins before 0 or before the one ahead of it, or ends behind the last token; a length
            is less than 0, or more than there is room for, or than its bound. The entry is named.
    """
    for axis, letter in LETTERS.items():
        if manifest.lengths.of(axis) == "dense":
            continue
        is_ragged = manifest.lengths.is_by_token(axis)
        rows = sizes[f"tokens_{letter}" if is_ragged else LENGTHS[axis]]
        room = [rows] * sizes["batch"]
        if is_ragged:
            name = f"cu_seqlens_{letter}"
            starts = passed[name].tolist()
            for place, (before, number) in enumerate(zip([0, *starts], starts, strict=False)):
                if not before <= number <= rows:
                    must = f"{before} to {rows}: where sequences begin never falls, and ends with the tokens"
                    raise ArgumentError(f"{name}[{place}]", str(number), must)
            room = [stop - start for start, stop in pairwise(starts)]
        for name in (f"seqused_{letter}", f"leftpad_{letter}"):
            if name not in passed:
                continue
            numbers = passed[name].tolist()
            for place, (number, most) in enumerate(zip(numbers, room, strict=True)):
                if not 0 <= number <= most:
                    is_of_used = name.startswith("leftpad") and f"seqused_{letter}" in passed
                    what = f"the length {'used ' if is_of_used else ''}of sequence {place}"
                    if manifest.lengths.is_paged(axis) and not is_of_used:
                        what = f"the keys that a row of {BLOCK_TABLE.name} has room for"
                    raise ArgumentError(f"{name}[{place}]", str(number), f"0 to {most}, {what}")
            if name.startswith("seqused"):
                room = numbers
        for place, length in enumerate(room):
            if is_ragged and length > (most := sizes[LENGTHS[axis]]):
                must = f"{length} or more, the length of sequence {place}"
                raise ArgumentError(f"max_seqlen_{letter}", str(most), must)


def _count(argument: LengthArgument, x: Any) -> int:
    """How many sequences a tensor tells of."""
    form = "batch + 1" if argument.is_cumulative else "batch"
    if not isinstance(x, torch.Tensor):
        got = "nothing" if x is None else type(x).__name__
        raise ArgumentError(
            argument.name, got, f"a torch tensor: i32[{form}], the lengths of {argument.axis}"
        )
    check_plain(argument.name, x)
    if x.dim() != 1:
        raise ArgumentError(argument.name, f"{x.dim()} dimensions", f"1: i32[{form}]")
    if x.shape[0] > 1 and x.stride(0) != 1:
        cure = f"pass {argument.name}.contiguous()"
        raise ArgumentError(argument.name, f"stride {x.stride(0)}", "contiguous elements", cure)
    if argument.is_cumulative and not x.shape[0]:
        raise ArgumentError(argument.name, "0 elements", "1 more than there are sequences: [0] for none")
    return x.shape[0] - argument.is_cumulative
