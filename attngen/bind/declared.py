"""What a call passes by name for the scalars and tensors of its spec: checked like every other argument."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch

from attngen.bind.block_lists import BLOCKS, sizes_of_map
from attngen.bind.numbers import scalar_of
from attngen.bind.tensors import check_no_derivative, check_plain, check_rows
from attngen.dtypes import element_dtype
from attngen.errors import ArgumentError
from attngen.expr import PAGE_SIZES, SINK, SIZE_NAMES, TOKENS
from attngen.plan import (
    BLOCK_TABLE,
    CACHE_ROWS,
    GIVEN_BLOCK_VALUES,
    GRADIENTS_INTAKE,
    Axis,
    Intake,
    Lengths,
    Manifest,
    Scalar,
    Value,
    evaluate_formula,
    formula_text,
)
from attngen.quantize import DESCALES

_RAGGED = Lengths("ragged", "ragged")
_OF_LENGTHS = {*(each.name for each in _RAGGED.arguments), *_RAGGED.bounds}
"""What says lengths: of padded sequences no others do than of ragged ones."""
_OF_PAGES = {BLOCK_TABLE.name, CACHE_ROWS.name}
"""What says where keys in pages lie."""
_BESIDE = {GRADIENTS_INTAKE: "a backward pass takes"}
"""Why a way to begin a call has more values than q, k and v."""
_NOTHING_IF_NONE = {*_OF_LENGTHS, *_OF_PAGES, BLOCKS, SINK}
"""What any call may pass as None."""


class DeclaredValues(NamedTuple):
    """What a call passes by name.

    Attributes:
        tensors: by the names of their values.
        scalars: a value each, defaults included.
        sizes: of the dimensions that tensors are declared with.
    """

    tensors: dict[str, torch.Tensor]
    scalars: dict[str, Any]
    sizes: dict[str, int]


def declared_by(manifest: Manifest, passed: Mapping[str, Any]) -> list[Value]:
    """The values that a call passes for what its spec declares: one of each argument, which may be of many formats.

    Args:
        manifest: of the call.
        passed: by name; where it fits none of the formats the first is taken, for others to refuse.
    """
    found: dict[str, Value] = {}
    for value in manifest.declared:
        is_meant = getattr(passed.get(value.passed_as), "dtype", None) == element_dtype(value.dtype)
        if is_meant or value.passed_as not in found:
            found[value.passed_as] = value
    return list(found.values())


def check_declared(
    manifest: Manifest,
    intake: Intake,
    passed: Mapping[str, Any],
    sizes: Mapping[str, int],
    device: torch.device,
) -> DeclaredValues:
    """Check what a call passes by name.

    Args:
        manifest: of the call.
        intake: in which way it begins; e4m3 tensors have descales beside them.
        passed: by name.
        sizes: of the call: batch, lengths, heads.
        device: that tensors must be on.

    Raises:
        ArgumentError: the first fault found.
    """
    declared = declared_by(manifest, passed)
    beside = [manifest.value_of[name] for name in intake.beside]
    known = [value.passed_as for value in (*declared, *beside)] + [each.name for each in manifest.scalars]
    for name in passed:
        if name not in known and (passed[name] is not None or name not in _NOTHING_IF_NONE):
            _refuse(manifest, name, [each for each in known if each is not None])
    scalars = {entry.name: _scalar(entry, passed) for entry in manifest.scalars}
    sizes = {
        name: sizes[name] for name in (*SIZE_NAMES, *TOKENS, *PAGE_SIZES) if name in sizes
    }  # all others are for tensors to bind
    bound = sizes_of_map(manifest, passed, sizes)
    tensors = {
        value.name: _tensor(value, says, passed, {**sizes, **bound}, bound, device, manifest)
        for values, says in (
            (declared, "the spec declares"),
            ([value for value in beside if value.name in GIVEN_BLOCK_VALUES], "of the spec's blocks it is"),
            (
                [value for value in beside if value.name not in GIVEN_BLOCK_VALUES],
                _BESIDE.get(intake.name, "e4m3 tensors have"),
            ),
        )
        for value in values
        if not (value.optional and passed.get(value.passed_as) is None and value.source == "given")
    }
    return DeclaredValues(tensors, scalars, {**sizes, **bound})


def _refuse(manifest: Manifest, name: str, known: list[str]) -> None:
    """Refuse an argument that the call does not have."""
    elsewhere = {
        name for intake in manifest.intakes if intake.name != GRADIENTS_INTAKE for name in intake.beside
    }
    if name == BLOCKS:
        cure = "compile with blocks: {block_m: 128, block_n: 128}"
        raise ArgumentError(name, "given blocks", "none: the spec has no blocks", cure)
    if name in elsewhere:
        raise ArgumentError(name, "descales", "none: q is quantised by the call, or has its own")
    if name == SINK:
        raise ArgumentError(
            name, "an argument", "none: the spec has no sink", "say sink: per_head in the spec"
        )
    if name in DESCALES[1:]:
        cure = "say precision: {cache: e4m3} in the spec"
        raise ArgumentError(name, "descales", "none: k and v have 16 bits", cure)
    if name in _OF_LENGTHS or name in _OF_PAGES:
        axis: Axis = "queries" if name.endswith("q") else "keys"
        kind = "paged" if name in _OF_PAGES else "padded" if name.startswith("seqused") else "ragged"
        cure = f"say problem: {{{axis}: {kind}}} in the spec"
        raise ArgumentError(name, "an argument", f"none: {axis} are {manifest.lengths.of(axis)}", cure)
    near = get_close_matches(name, known, n=1) or known
    must = f"one of what the spec declares: {', '.join(near)}" if known else "no such argument"
    raise ArgumentError(name, "an argument", must)


def _scalar(entry: Scalar, passed: Mapping[str, Any]) -> bool | int | float:
    value = passed.get(entry.name, entry.default)
    if value is None:
        raise ArgumentError(entry.name, "nothing", f"a value: the spec declares {entry.type} without default")
    return scalar_of(entry.name, entry.type, value)


def _tensor(
    value: Value,
    says: str,
    passed: Mapping[str, Any],
    sizes: Mapping[str, int],
    bound: dict[str, int],
    device: torch.device,
    manifest: Manifest,
) -> torch.Tensor:
    """The tensor, whose dimensions of new names bind these; one element expanded where that stands for all."""
    name, expected_type = value.passed_as, element_dtype(value.dtype)
    formats = [each.dtype for each in manifest.declared if each.passed_as == name] or [value.dtype]
    declared = f"{_listed(formats)}[{', '.join(map(formula_text, value.shape))}]"
    x = passed.get(name)
    if not isinstance(x, torch.Tensor):
        got = "nothing" if x is None else type(x).__name__
        raise ArgumentError(name, got, f"a torch tensor: {says} {declared}")
    check_plain(name, x)
    if x.dtype != expected_type:
        must = _listed([str(element_dtype(each)) for each in formats])
        raise ArgumentError(name, f"dtype {x.dtype}", must, f"pass {name}.to({expected_type})")
    if x.device != device:
        raise ArgumentError(name, f"device {x.device}", f"{device}, the device of q")
    if value.axes:
        check_rows(manifest.arch, name, x)
    check_no_derivative(
        name, x, is_declared=not value.axes and value.source == "given" and not value.optional
    )
    if value.shared:
        x = _spread(x, value, sizes)
    if x.dim() != len(value.shape):
        raise ArgumentError(name, f"{x.dim()} dimensions", f"{len(value.shape)}: {declared}")
    for dim, size in zip(value.shape, x.shape, strict=True):
        is_bound_here = isinstance(dim, str) and dim not in sizes
        if isinstance(dim, str) and is_bound_here:
            bound.setdefault(dim, size)
        expected = evaluate_formula(dim, {**sizes, **bound})
        if size != expected:
            raise ArgumentError(
                name, f"shape {tuple(x.shape)}", f"{declared}, where {formula_text(dim)} is {expected}"
            )
        if not size and (is_bound_here or isinstance(dim, int)):
            raise ArgumentError(name, f"shape {tuple(x.shape)}", f"at least one {dim}")
    return x


def _spread(x: torch.Tensor, value: Value, sizes: Mapping[str, int]) -> torch.Tensor:
    """A tensor of which one element stands for all, or a row for every first index; any other as it is."""
    shape = [evaluate_formula(dim, sizes) for dim in value.shape]
    if x.numel() == 1:
        return x.reshape((1,) * len(shape)).expand(shape)
    return x.expand(shape) if list(x.shape) == shape[1:] else x


def _listed(names: list[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
