"""The shapes a command works on: the spec's `check` shapes, or the one that options give; numbers as options."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, Literal, TypeVar, cast

import click

from attngen.check.cuts import Cut, CutKind
from attngen.check.inputs import Shape
from attngen.errors import ArgumentError
from attngen.expr import LARGEST_LENGTH
from attngen.spec import Spec

Command = TypeVar("Command", bound=Callable[..., Any])
Letter = Literal["q", "k"]

DEFAULT_SHAPE = Shape(batch=1, heads=2, heads_kv=1, seqlen_q=113, seqlen_k=203)
"""For a spec without check shapes: two query heads on one of K and V, and lengths that no tile divides."""
DEFAULT_LENGTHS: dict[Letter, tuple[int, ...]] = {"q": (113, 0, 5, 70), "k": (203, 30, 5, 70)}
"""In the place of one length, of sequences that have their own; one of them is empty, and one has as many keys."""
DEFAULT_LENGTH = 128

DEFAULT_PAGE = 16
"""Rows of a page, where keys lie in pages and nothing says of how many."""
PADDING = 3
"""Rows behind the longest of padded sequences that a drawn call has."""

_MOST_SHOWN = 40  # characters of a value that a message repeats
_MOST_LENGTHS = 8  # that a line has room for


class Integer(click.IntRange):
    """An integer of a range, whose faults are one short line however long the value is."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The integer that a text is."""
        if len(text := str(value)) > _MOST_SHOWN:
            shown = f"{text[:_MOST_SHOWN]}… of {len(text)} characters"
            self.fail(f"{shown} is not an integer in the range {self._describe_range()}.", param, ctx)
        return int(super().convert(value, param, ctx))


LENGTH = Integer(0, LARGEST_LENGTH)
"""What a size of a call may be, as in the check shapes of a spec."""
POSITIVE = Integer(1, LARGEST_LENGTH)
SEED = Integer(0, 2**63 - 1)
"""What torch's generators take, with room for what is added to tell tensors apart."""


def _lengths(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """`5,100,0,77` as lengths, at least one."""
    if text is None:
        return None
    return tuple(LENGTH.convert(word.strip(), param, ctx) for word in text.split(","))


_OPTIONS = {
    "--batch": "Batch size [1].",
    "--heads": "Query heads [1].",
    "--heads-kv": "Heads of K and V [as many as query heads].",
    "--seqlen-q": f"Queries [as many as keys, or {DEFAULT_LENGTH}]; also --seqlen.",
    "--seqlen-k": "Keys [as many as queries].",
    "--lengths": "Of ragged or padded sequences, queries and keys alike: 5,100,0,77.",
    "--lengths-q": "Of ragged or padded sequences, queries.",
    "--lengths-k": "Of ragged or padded sequences, or of those in pages, keys.",
    "--page": f"Rows of a page, where keys lie in pages [{DEFAULT_PAGE}].",
}


@dataclass(frozen=True)
class GivenSizes:
    """What options say of a shape; None of what they do not say. Names are those of options."""

    batch: int | None = None
    heads: int | None = None
    heads_kv: int | None = None
    seqlen_q: int | None = None
    seqlen_k: int | None = None
    lengths: tuple[int, ...] | None = None
    lengths_q: tuple[int, ...] | None = None
    lengths_k: tuple[int, ...] | None = None
    page: int | None = None

    def shape(self, spec: Spec) -> Shape:
        """The shape of a call of a spec.

        Raises:
            ArgumentError: heads of K and V that do not divide those of Q; lengths that are missing, that the spec has
                no use for, or of which there are not as many for queries as for keys.
        """
        heads = 1 if self.heads is None else self.heads
        heads_kv = heads if self.heads_kv is None else self.heads_kv
        if heads % heads_kv if heads_kv else heads:
            raise ArgumentError("--heads-kv", heads_kv, f"a divisor of {heads}, the heads of q")
        kinds = cut_kinds(spec)
        self._check_letters(kinds)
        lengths = {letter: self._lengths_of(letter, kind) for letter, kind in kinds.items()}
        queries = next((n for n in (self.seqlen_q, self.seqlen_k) if n is not None), DEFAULT_LENGTH)
        keys = queries if self.seqlen_k is None else self.seqlen_k
        batch = 1 if self.batch is None else self.batch
        whole, page = Shape(batch, heads, heads_kv, queries, keys), self.page
        return cut_shape(spec, lengths, whole, page=DEFAULT_PAGE if page is None else page)

    def _lengths_of(self, letter: Letter, kind: str) -> tuple[int, ...]:
        """What is said of an axis that is cut."""
        own = getattr(self, f"lengths_{letter}")
        found: tuple[int, ...] | None = self.lengths if own is None else own
        if found is None:
            axis = "queries" if letter == "q" else "keys"
            raise ArgumentError(
                f"--lengths-{letter}",
                "nothing",
                f"a length for each sequence: {axis} are {kind}",
                "--lengths 5,100,0,77",
            )
        return found

    def _check_letters(self, kinds: Mapping[Letter, CutKind]) -> None:
        """Refuse what says something of an axis that is cut otherwise."""
        axes: dict[Letter, str] = {"q": "queries", "k": "keys"}
        for letter, axis in axes.items():
            if letter in kinds and getattr(self, f"seqlen_{letter}") is not None:
                must = f"--lengths-{letter}: {axis} are {kinds[letter]}"
                raise ArgumentError(f"--seqlen-{letter}", getattr(self, f"seqlen_{letter}"), must)
            if letter not in kinds and getattr(self, f"lengths_{letter}") is not None:
                raise ArgumentError(f"--lengths-{letter}", "lengths", f"--seqlen-{letter}: {axis} are dense")
        if self.lengths is not None and not kinds:
            raise ArgumentError("--lengths", "lengths", "--seqlen: the spec's sequences are dense")
        if self.lengths is not None and all(getattr(self, f"lengths_{each}") is not None for each in kinds):
            raise ArgumentError("--lengths", "lengths", "left out where each axis has its own")
        if self.page is not None and kinds.get("k") != "paged":
            must = f"left out: keys are {kinds.get('k', 'dense')}"
            raise ArgumentError("--page", self.page, must, "say problem: {keys: paged} in the spec")
        if self.batch is not None and kinds:
            raise ArgumentError("--batch", self.batch, "left out: there are as many sequences as lengths")


def shape_options(command: Command) -> Command:
    """Options for every field of `GivenSizes`, which the command gets as `given`; None where no option is.

    `--seqlen` is `--seqlen-q`, which gives both.
    """
    return _given_options(command, _OPTIONS)


def lengths_options(command: Command) -> Command:
    """Options for lengths and pages of sequences alone, which the command gets as `given`; None where no option is."""
    of_lengths = {name: text for name, text in _OPTIONS.items() if name.startswith(("--lengths", "--page"))}
    return _given_options(command, of_lengths)


def _given_options(command: Command, wanted: Mapping[str, str]) -> Command:
    fields = [name.removeprefix("--").replace("-", "_") for name in wanted]

    @wraps(command)
    def with_given(*args: Any, **options: Any) -> Any:
        sizes = {name: options.pop(name) for name in fields}
        is_said = any(size is not None for size in sizes.values())
        return command(*args, given=GivenSizes(**sizes) if is_said else None, **options)

    decorated: Any = with_given
    for name, text in reversed([*wanted.items()]):
        names = (name, "--seqlen", "seqlen_q") if name == "--seqlen-q" else (name,)
        kind: dict[str, Any] = {"type": POSITIVE if name == "--page" else LENGTH}
        if name.startswith("--lengths"):
            kind = {"callback": _lengths, "metavar": "N,N,..."}
        decorated = click.option(*names, **kind, default=None, help=text)(decorated)
    return cast("Command", decorated)


def shapes_of(spec: Spec, given: GivenSizes | None = None) -> tuple[Shape, ...]:
    """The shape given, else the spec's check shapes, else `DEFAULT_SHAPE`, or that with `DEFAULT_LENGTHS`.

    Raises:
        ArgumentError: as of `GivenSizes.shape`.
    """
    if given is not None:
        return (given.shape(spec),)
    shapes = []
    for check in spec.check:
        heads_kv = check.heads if check.heads_kv is None else check.heads_kv
        said: dict[Letter, tuple[int, ...]] = {"q": check.seqlens_q, "k": check.seqlens_k}
        lengths = {letter: each for letter, each in said.items() if each}
        shapes.append(
            cut_shape(
                spec,
                lengths,
                Shape(check.batch, check.heads, heads_kv, check.seqlen_q or 0, check.seqlen_k or 0),
                page=check.page or DEFAULT_PAGE,
            )
        )
    return tuple(shapes) or (cut_shape(spec, DEFAULT_LENGTHS, DEFAULT_SHAPE),)


def cut_kinds(spec: Spec) -> dict[Letter, CutKind]:
    """How sequences are cut that have lengths of their own, by the letter of their axis."""
    kinds: dict[Letter, Any] = {"q": spec.problem.queries, "k": spec.problem.keys}
    return {letter: kind for letter, kind in kinds.items() if kind != "dense"}


def cut_shape(
    spec: Spec,
    lengths: Mapping[Letter, tuple[int, ...]],
    whole: Shape,
    padding: int = PADDING,
    page: int = DEFAULT_PAGE,
) -> Shape:
    """A shape with lengths for every axis of the spec that is cut; what is padded has some rows behind the longest.

    What lies in pages, of so many rows each, likewise.

    Raises:
        ArgumentError: not as many lengths of queries as of keys.
    """
    cuts = {
        letter: Cut(
            kind,
            lengths[letter],
            tail=0 if kind == "ragged" else padding,
            page=page if kind == "paged" else 0,
        )
        for letter, kind in cut_kinds(spec).items()
    }
    if not cuts:
        return whole
    counts = {letter: len(cut.lengths) for letter, cut in cuts.items()}
    if len(set(counts.values())) > 1:
        raise ArgumentError(
            "--lengths-k", f"{counts['k']} lengths", f"{counts['q']}, as there are of queries"
        )
    queries, keys = cuts.get("q"), cuts.get("k")
    return replace(
        whole,
        batch=next(iter(counts.values())),
        seqlen_q=queries.size if queries else whole.seqlen_q,
        seqlen_k=keys.size if keys else whole.seqlen_k,
        queries=queries,
        keys=keys,
    )


def shape_text(shape: Shape) -> str:
    """A shape in one line."""
    heads = str(shape.heads) if shape.heads == shape.heads_kv else f"{shape.heads}:{shape.heads_kv}"
    if not shape.cuts:
        return f"batch {shape.batch}, heads {heads}, {shape.seqlen_q}x{shape.seqlen_k}"
    queries, keys = (
        _lengths_text(cut.lengths) if cut else str(length)
        for cut, length in ((shape.queries, shape.seqlen_q), (shape.keys, shape.seqlen_k))
    )
    page = f", page {shape.keys.page}" if shape.keys and shape.keys.page else ""
    return f"heads {heads}, lengths {queries if queries == keys else f'{queries} x {keys}'}{page}"


def _lengths_text(lengths: tuple[int, ...]) -> str:
    """Lengths, or the range of many."""
    if len(lengths) <= _MOST_LENGTHS:
        return ",".join(map(str, lengths))
    return f"{min(lengths)}..{max(lengths)} of {len(lengths)} sequences, {sum(lengths)} in all"
