"""What values of a spec must be together, and what a target takes.

The rules read plain data rather than a Spec, so that they speak even where another value is broken and all faults
stand in one report; a value of the wrong type is the schema's fault to tell.
"""

import math
import re
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, TypeGuard

from attngen.arch import ARCHS
from attngen.expr import SINK
from attngen.quantize import HADAMARD_DIMS
from attngen.spec.broken import Broken
from attngen.spec.cache_rules import check_cache
from attngen.spec.models import INPUTS, Precision

_GPU_HEAD_DIMS = range(32, 257, 8)
_GPU_HEAD_DIMS_8BIT = range(32, 257, 16)
_SIMULATOR_HEAD_DIMS = range(1, 513)
_PRECISION = {name: field.default for name, field in Precision.model_fields.items()}
"""What `precision` says where the spec says nothing."""
_OF_E4M3 = ("scales", "incoherent", "seed", "promote")
"""The fields of `precision` that mean something to e4m3 inputs alone."""


def check_rules(data: dict[str, Any]) -> Iterator[Broken]:
    """Every rule that the data of a spec breaks."""
    problem, precision = data.get("problem"), data.get("precision")
    head_dim = problem.get("head_dim") if isinstance(problem, dict) else None
    said = _said(precision)
    yield from _head_dims(head_dim, _legal_of(data))
    yield from _fields_of_e4m3(said, head_dim)
    yield from check_cache(data, said)
    yield from _gradients(data, said["inputs"], said["output"])
    yield from _lengths(data, problem if isinstance(problem, dict) else {})
    yield from _split(data, said["inputs"])


def nearest_head_dims(data: dict[str, Any], dim: int) -> tuple[str, ...]:
    """The head dims nearest to a number, of those that the target and the format in the data take."""
    legal = _legal_of(data)
    return (str(dim),) if dim in legal else tuple(map(str, _neighbours(dim, legal)))


def _legal_of(data: dict[str, Any]) -> range:
    said = _said(data.get("precision"))
    formats = (said["inputs"], said["cache"])
    return legal_head_dims(data.get("target", "auto"), "e4m3" if "e4m3" in formats else said["inputs"])


def _said(precision: object) -> dict[str, Any]:
    """The fields of `precision`, with defaults."""
    return _PRECISION | (precision if isinstance(precision, dict) else {})


def legal_head_dims(target: object, inputs: object) -> range:
    """Head dims that a target takes of a format of Q, K and V; an unknown target is taken for a GPU."""
    arch = ARCHS.get(str(target))
    if arch is not None and not arch.emits:
        return _SIMULATOR_HEAD_DIMS
    return _GPU_HEAD_DIMS_8BIT if inputs == "e4m3" else _GPU_HEAD_DIMS


def _head_dims(head_dim: object, legal: range) -> Iterator[Broken]:
    step = f"a multiple of {legal.step}" if legal.step > 1 else "an integer"
    dims = (
        {f".{key}": value for key, value in head_dim.items()}
        if isinstance(head_dim, dict)
        else {"": head_dim}
    )
    for key, dim in dims.items():
        if key in ("", ".qk", ".v") and is_positive(dim) and dim not in legal:
            yield Broken(
                path=f"problem.head_dim{key}",
                value=dim,
                must=f"must be {step} from {legal[0]} to {legal[-1]}",
                rule="head-dim",
                note="rows are copied 16 bytes at a time, and O is kept in registers"
                if legal.step > 1
                else "",
                nearest=tuple(str(near) for near in _neighbours(dim, legal)),
            )


def _fields_of_e4m3(said: dict[str, Any], head_dim: object) -> Iterator[Broken]:
    inputs, incoherent, promote = said["inputs"], said["incoherent"], said["promote"]
    of_cache = ("scales",) if said["cache"] == "e4m3" else ()
    for field in _OF_E4M3 if inputs != "e4m3" else ():
        if said[field] != _PRECISION[field] and field not in of_cache:
            yield Broken(
                path=f"precision.{field}",
                value=said[field],
                must=f"means nothing to {inputs}",
                rule="precision-field",
                note="it is for inputs: e4m3" + (", and for cache: e4m3" if field == "scales" else ""),
                nearest=(str(_PRECISION[field]),),
            )
    if inputs != "e4m3":
        return
    if is_positive(said["seed"]) and incoherent == "none":
        yield Broken(
            path="precision.seed",
            value=said["seed"],
            must="means nothing without a Hadamard matrix",
            rule="precision-field",
            note="it is of the signs of incoherent: hadamard",
            nearest=("0",),
        )
    qk = head_dim.get("qk") if isinstance(head_dim, dict) else head_dim
    if incoherent == "hadamard" and is_positive(qk) and qk not in HADAMARD_DIMS:
        yield Broken(
            path="precision.incoherent",
            value=incoherent,
            must=f"must be none where Q and K have {qk} columns",
            rule="hadamard-columns",
            note=f"the matrix is one of {_listed(HADAMARD_DIMS)} columns",
            nearest=("none",),
        )
    if is_positive(promote) and promote > 1:
        yield Broken(
            path="precision.promote",
            value=promote,
            must="must be 0 (never), 1 (every block of keys) or auto",
            rule="promotion",
            note="every block rescales O anyhow, and promotes with the same instruction: fewer promotions save nothing",
            nearest=("1",),
        )


def _gradients(data: dict[str, Any], inputs: object, output: object) -> Iterator[Broken]:
    names = data.get("gradients")
    if not isinstance(names, list | tuple) or not names:
        return
    of = "bf16" if inputs == "e4m3" else inputs
    if output in ("bf16", "f16") and output != of:
        are = "gradients of e4m3 inputs are worked out in it" if of != inputs else "as the inputs are"
        yield Broken(
            path="precision.output",
            value=output,
            must=f"must be {of}, {are}, or f32 where gradients are wanted",
            rule="output-with-gradients",
            note="the gradient of an output is multiplied by inputs, and has their type",
            nearest=(str(of), "f32"),
        )
    declared = [
        name for block in ("scalars", "tensors") if isinstance(data.get(block), dict) for name in data[block]
    ]
    if data.get("sink", "none") != "none":
        declared.append(SINK)
    known, are_known = [*INPUTS, *declared], True
    for index, name in enumerate(names):
        if name in known and name not in names[:index]:
            continue
        are_known = False
        if name == SINK and name not in known:
            yield Broken(
                path=f"gradients[{index}]",
                value=name,
                must="must stand beside sink: per_head",
                rule="gradient-of-sink",
                note="without that key there is no learned sink",
                nearest=("sink: per_head", f"gradients: {_nearest_gradients(names, known)}"),
            )
        elif isinstance(name, str):  # what is no text is the schema's to tell
            yield Broken(
                path=f"gradients[{index}]",
                value=name,
                must="must stand there once" if name in known else f"must be one of {', '.join(known)}",
                rule="unique-gradients" if name in known else "known-gradients",
                note="" if name in known else "there are gradients of inputs, and of what the score reads",
                nearest=(f"gradients: {_nearest_gradients(names, known)}",),
            )
    if are_known and not set(INPUTS) <= set(names):
        yield Broken(
            path="gradients",
            value=names,
            must="must have q, k and v",
            rule="all-gradients",
            note="autograd makes those of the tensors that require grad, and no others",
            nearest=(_nearest_gradients(names, known),),
        )


def _lengths(data: dict[str, Any], problem: dict[str, Any]) -> Iterator[Broken]:
    """What sequences with lengths of their own rule out."""
    kinds = {axis: problem.get(axis, "dense") for axis in ("queries", "keys")}
    tensors = data.get("tensors")
    for name, text in tensors.items() if isinstance(tensors, dict) else ():
        for axis, letter in (("queries", "q"), ("keys", "k")):
            wrong, right = f"tokens_{letter}", f"batch, seqlen_{letter}"
            if kinds[axis] == "ragged":
                wrong, right = f"seqlen_{letter}", wrong
            if isinstance(text, str) and re.search(rf"\b{wrong}\b", text):
                yield Broken(
                    path=f"tensors.{name}",
                    value=text,
                    must=f"must have no dimension {wrong}",
                    rule="ragged-dimensions",
                    note=f"{axis} are {kinds[axis]}, so that there is {right}",
                    nearest=(re.sub(rf"(batch\s*,\s*)?\b{wrong}\b", right, text),),
                )
    if _said(data.get("precision"))["inputs"] == "e4m3" and set(kinds.values()) != {"dense"}:
        cut = next(axis for axis, kind in kinds.items() if kind != "dense")
        yield Broken(
            path="precision.inputs",
            value="e4m3",
            must=f"must have 16 bits where {cut} are {kinds[cut]}",
            rule="lengths-of-16-bit",
            note="V of e4m3 is stored by columns, in blocks of keys that begin with a tensor, not with a sequence",
            nearest=("bf16", "f16", f"problem.{cut}: dense"),
        )
    names = data.get("gradients")
    names = names if isinstance(names, list | tuple) else ()
    if names and kinds["keys"] == "paged":
        yield Broken(
            path="gradients",
            value=names,
            must="must be [] where keys are paged",
            rule="paged-gradients",
            note="no backward pass writes gradients of K and V to pages",
            nearest=("[]", "problem.keys: ragged", "problem.keys: padded"),
        )
        return
    more = [name for name in names if name not in (*INPUTS, SINK)]
    if more and set(kinds.values()) != {"dense"}:
        yield Broken(
            path="gradients",
            value=names,
            must="must be q, k, v and sink at most where sequences have lengths of their own",
            rule="ragged-gradients",
            note=f"the gradient of {more[0]} is a sum over sequences of one length",
            nearest=(f"gradients: [{', '.join(name for name in names if name not in more)}]",),
        )


def _split(data: dict[str, Any], inputs: object) -> Iterator[Broken]:
    """What parts of keys rule out."""
    split = data.get("split", "none")
    if split == "none":
        return

    def broken(path: str, value: object, must: str, note: str, *nearest: str) -> Broken:
        return Broken(path, value, f"{must} where keys are split", "split-of-keys", note, nearest)

    schedule, tile = data.get("schedule"), data.get("tile")
    kind = schedule.get("kind", "auto") if isinstance(schedule, dict) else "auto"
    if kind == "serial":
        note = "it keeps O of a tile where one block of threads alone comes to all of its keys"
        yield broken("schedule.kind", kind, "must be fa2 or one for warpgroups", note, "fa2", "split: none")
    if isinstance(schedule, dict) and schedule.get("persistent") is True:
        note = "parts are listed, and each has a block of threads"
        yield broken("schedule.persistent", True, "must be false", note, "false", "split: none")
    if inputs == "e4m3":
        yield broken(
            "precision.inputs", inputs, "must be bf16 or f16", "parts are for 16-bit tiles", "bf16", "f16"
        )
    if data.get("gradients"):
        note = "parts are for calls of few queries, which nobody trains on"
        yield broken("gradients", data["gradients"], "must be []", note, "[]", "split: none")
    keys = split.get("keys") if isinstance(split, dict) else None
    block_n = tile.get("block_n") if isinstance(tile, dict) else None
    if is_positive(keys) and is_positive(block_n) and keys % block_n:
        note = "a part is whole blocks of keys"
        yield broken("tile.block_n", block_n, f"must divide {keys}", note, str(math.gcd(keys, block_n)))


def _nearest_gradients(names: list[Any] | tuple[Any, ...], known: list[str]) -> str:
    """The inputs, and of what else stands there what is known or is spelt like it, each once."""
    near = (get_close_matches(name, known, n=1) for name in names if isinstance(name, str))
    return f"[{', '.join(dict.fromkeys((*INPUTS, *(each for found in near for each in found))))}]"


def _listed(numbers: tuple[int, ...]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}"


def _neighbours(dim: int, legal: range) -> list[int]:
    """The largest legal value below, and the smallest above."""
    return [near for near in legal if near < dim][-1:] + [near for near in legal if near > dim][:1]


def is_positive(value: object) -> TypeGuard[int]:
    """Whether a value is a positive integer, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
