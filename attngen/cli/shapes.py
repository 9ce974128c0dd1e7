"""The shapes a command works on: the spec's `check` shapes, or the one that options give; integers as options."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from attngen.check.inputs import Shape
from attngen.errors import ArgumentError
from attngen.expr import LARGEST_LENGTH
from attngen.spec import Spec

Command = TypeVar("Command", bound=Callable[..., Any])

DEFAULT_SHAPE = Shape(batch=1, heads=2, heads_kv=1, seqlen_q=113, seqlen_k=203)
"""For a spec without check shapes: two query heads on one of K and V, and lengths that no tile divides."""
DEFAULT_LENGTH = 128

_MOST_SHOWN = 40  # characters of a value that a message repeats


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

_OPTIONS = {
    "--batch": "Batch size [1].",
    "--heads": "Query heads [1].",
    "--heads-kv": "Heads of K and V [as many as query heads].",
    "--seqlen-q": f"Queries [as many as keys, or {DEFAULT_LENGTH}]; also --seqlen.",
    "--seqlen-k": "Keys [as many as queries].",
}


def shape_options(command: Command) -> Command:
    """`--batch`, `--heads`, `--heads-kv`, `--seqlen-q`, `--seqlen-k`; `--seqlen` is `--seqlen-q`, which gives both."""
    for name, text in reversed(_OPTIONS.items()):
        names = (name, "--seqlen", "seqlen_q") if name == "--seqlen-q" else (name,)
        command = click.option(*names, type=LENGTH, default=None, help=text)(command)
    return command


def given_shape(
    batch: int | None, heads: int | None, heads_kv: int | None, seqlen_q: int | None, seqlen_k: int | None
) -> Shape | None:
    """The shape that options ask for; None where none of them is given.

    Raises:
        ArgumentError: heads of K and V that do not divide those of Q.
    """
    if all(size is None for size in (batch, heads, heads_kv, seqlen_q, seqlen_k)):
        return None
    heads = 1 if heads is None else heads
    heads_kv = heads if heads_kv is None else heads_kv
    if heads % heads_kv if heads_kv else heads:
        raise ArgumentError("--heads-kv", heads_kv, f"a divisor of {heads}, the heads of q")
    queries = next((n for n in (seqlen_q, seqlen_k, DEFAULT_LENGTH) if n is not None), DEFAULT_LENGTH)
    return Shape(
        batch=1 if batch is None else batch,
        heads=heads,
        heads_kv=heads_kv,
        seqlen_q=queries,
        seqlen_k=queries if seqlen_k is None else seqlen_k,
    )


def shapes_of(spec: Spec, given: Shape | None = None) -> tuple[Shape, ...]:
    """The shape given, else the spec's check shapes, else `DEFAULT_SHAPE`."""
    if given is not None:
        return (given,)
    return tuple(
        Shape(
            check.batch,
            check.heads,
            check.heads if check.heads_kv is None else check.heads_kv,
            check.seqlen_q,
            check.seqlen_k,
        )
        for check in spec.check
    ) or (DEFAULT_SHAPE,)


def shape_text(shape: Shape) -> str:
    """A shape in one line."""
    heads = str(shape.heads) if shape.heads == shape.heads_kv else f"{shape.heads}:{shape.heads_kv}"
    return f"batch {shape.batch}, heads {heads}, {shape.seqlen_q}x{shape.seqlen_k}"
