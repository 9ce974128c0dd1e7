"""What the values of a check shape must be together, and beside how the problem is cut into sequences."""

from collections.abc import Iterator
from typing import Any

from attngen.expr import LARGEST_LENGTH
from attngen.spec.broken import Broken
from attngen.spec.rules import is_positive

_LETTERS = {"queries": "q", "keys": "k"}
_EXAMPLE = "[5, 0, 130]"
_CUT = ("ragged", "padded", "paged")
"""Kinds of sequences that have lengths of their own."""


def check_shapes(data: dict[str, Any]) -> Iterator[Broken]:
    """Every rule that the check shapes in the data of a spec break."""
    shapes, problem = data.get("check"), data.get("problem")
    said = problem if isinstance(problem, dict) else {}
    kinds = {axis: said.get(axis, "dense") for axis in _LETTERS}
    for index, shape in enumerate(shapes if isinstance(shapes, list | tuple) else ()):
        if isinstance(shape, dict):
            yield from _grouped_heads(f"check[{index}]", shape)
            yield from _sequences(f"check[{index}]", shape, kinds)
            yield from _pages(f"check[{index}]", shape, kinds["keys"])


def _sequences(path: str, shape: dict[str, Any], kinds: dict[str, Any]) -> Iterator[Broken]:
    """Lengths where sequences have lengths of their own, one length where they have not."""
    for axis, letter in _LETTERS.items():
        one, each, is_cut = f"seqlen_{letter}", f"seqlens_{letter}", kinds[axis] in _CUT
        wanted, other, example = (each, one, _EXAMPLE) if is_cut else (one, each, "128")
        if other in shape:
            given = shape[other]
            if is_cut and is_positive(given):
                example = f"[{given}]"
            elif not is_cut and isinstance(given, list | tuple) and any(map(is_positive, given)):
                example = str(max(filter(is_positive, given)))
            why = "of one length" if kinds[axis] == "dense" else "each of a length of its own"
            yield Broken(
                path=f"{path}.{other}",
                value=shape[other],
                must=f"must be {wanted}: {axis} are {kinds[axis]}",
                rule="check-lengths",
                note=f"sequences are {why}, by problem.{axis}",
                nearest=(f"{wanted}: {example}",),
            )
        elif wanted not in shape:
            yield Broken(
                path=f"{path}.{wanted}",
                value=None,
                must="must be given",
                rule="required-keys",
                note=f"a length for each sequence: {axis} are {kinds[axis]}" if is_cut else "",
                nearest=(f"{wanted}: {example}",),
                is_missing=True,
            )
    given_lists = {letter: shape.get(f"seqlens_{letter}") for letter in _LETTERS.values()}
    lists = {letter: each for letter, each in given_lists.items() if isinstance(each, list | tuple)}
    if "batch" in shape and lists:
        yield Broken(
            path=f"{path}.batch",
            value=shape["batch"],
            must=f"must be left out beside seqlens_{next(iter(lists))}",
            rule="check-lengths",
            note="there are as many sequences as lengths",
            nearest=(),
        )
    if len(lists) == 2 and len(lists["q"]) != len(lists["k"]):
        count = len(lists["q"])
        fitted = [*lists["k"][:count], *(lists["k"][-1:] or [0]) * (count - len(lists["k"]))]
        yield Broken(
            path=f"{path}.seqlens_k",
            value=lists["k"],
            must=f"must have {count} lengths, as seqlens_q has",
            rule="check-lengths",
            note="the sequences of keys are those of queries",
            nearest=(f"[{', '.join(map(str, fitted))}]",),
        )


def _pages(path: str, shape: dict[str, Any], keys: Any) -> Iterator[Broken]:
    """The size of pages where keys are in pages, and nowhere else."""
    if keys == "paged" and "page" not in shape:
        yield Broken(
            path=f"{path}.page",
            value=None,
            must="must be given",
            rule="required-keys",
            note="rows of a page of K and V: keys are paged",
            nearest=("page: 16",),
            is_missing=True,
        )
    if keys != "paged" and "page" in shape:
        yield Broken(
            path=f"{path}.page",
            value=shape["page"],
            must=f"must be left out: keys are {keys}",
            rule="check-lengths",
            note="keys lie in pages by problem.keys: paged",
            nearest=(),
        )


def _grouped_heads(path: str, shape: dict[str, Any]) -> Iterator[Broken]:
    heads, heads_kv = shape.get("heads", 1), shape.get("heads_kv")
    if is_positive(heads) and is_positive(heads_kv) and heads <= LARGEST_LENGTH and heads % heads_kv:
        divisors = [divisor for divisor in range(1, min(heads, 4096) + 1) if heads % divisor == 0]
        below = [divisor for divisor in divisors if divisor < heads_kv][-1:]
        above = [divisor for divisor in divisors if divisor > heads_kv][:1]
        yield Broken(
            path=f"{path}.heads_kv",
            value=heads_kv,
            must=f"must divide heads = {heads}",
            rule="grouped-heads",
            note="every head of K and V serves a group of query heads, all of one size",
            nearest=tuple(str(divisor) for divisor in below + above),
        )
