"""Values for the scalars and tensors that a spec declares: drawn, read from files, or given as text.

Like those of `attngen.check.inputs`, values depend on declarations, sizes and seed alone: they are drawn on the CPU and
then moved. Nothing here knows a kernel; whether a tensor fits its declaration is checked where a call is.
"""

import math
import os
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch

from attngen.bind import check_sorted
from attngen.check.inputs import Shape
from attngen.dtypes import element_dtype
from attngen.errors import ArgumentError, shown
from attngen.expr import GIVEN_BLOCKS, Declarations, Scalar, TensorType
from attngen.expr.literals import DEFAULTS, nearest_defaults, read_default
from attngen.memory import check_room
from attngen.torch_state import torch_defaults

KINDS = ("sorted", "random", "hashed", "zeros")
"""What a declared tensor may hold.

- sorted: ascending along the last dimension; of integers, the ids of up to `IDS` documents one after another
- random: N(0, 1), integers from 0 to `IDS` - 1, or true for every other element
- hashed: as sorted, but every id stands for a number of its own that says nothing of their order; integers only
- zeros

What a spec declares sorted is drawn so: the ids of documents of any length, also below 0.
"""
IDS = 16
"""How many different integers are drawn."""
NEW_DIMENSION = 16
"""The size of a dimension that the declaration itself names, where no tensor from a file has bound it."""
MOST_DRAWN = 2**26
"""Numbers drawn of a tensor; a larger one repeats them, since a bias over all pairs has billions."""

_MOST_SHOWN = 200  # characters of a reason that a message repeats
_INTEGERS = {"u8": 2**8, "i32": 2**31}
"""How many numbers of these formats are not negative."""
_HASH = 2_654_435_761
"""Knuth's multiplier: odd, so that no two ids collide modulo a power of two. Source: TAOCP 3, section 6.4."""


@dataclass(frozen=True)
class Given:
    """What is said of declared values, in place of what is drawn by default.

    Attributes:
        tensors: one of `KINDS`, or the path of a file that torch.save wrote, by name.
        scalars: values as a spec would write them, by name.
    """

    tensors: Mapping[str, str] = field(default_factory=dict)
    scalars: Mapping[str, str] = field(default_factory=dict)

    def check_names(self, all_declarations: Iterable[Declarations]) -> None:
        """Refuse names that none of these declares; beside a spec that has a name may stand others that have not.

        Raises:
            ArgumentError: the first of them.
        """
        declared = list(all_declarations)
        for option, given, known in (
            ("--tensor", self.tensors, {name for each in declared for name in each.tensors}),
            ("--scalar", self.scalars, {name for each in declared for name in each.scalars}),
        ):
            for name in given:
                if name not in known:
                    near = get_close_matches(name, known, n=1) or sorted(known)
                    what = option.removeprefix("--")
                    must = (
                        f"a {what} that is declared: {', '.join(near)}"
                        if near
                        else f"none: no {what} is declared"
                    )
                    raise ArgumentError(f"{option} {name}", "a name that no spec declares", must)


NOTHING_GIVEN = Given()


def sizes_of(shape: Shape) -> dict[str, int]:
    """The sizes that a declared tensor's dimensions may name."""
    return {
        "batch": shape.batch,
        "num_heads_q": shape.heads,
        "num_heads_kv": shape.heads_kv,
        "seqlen_q": shape.seqlen_q,
        "seqlen_k": shape.seqlen_k,
        **{f"tokens_{letter}": cut.rows for letter, cut in shape.cuts.items() if cut.kind == "ragged"},
    }


@torch_defaults()
def declared_inputs(
    declarations: Declarations,
    shape: Shape,
    device: torch.device | str = "cpu",
    seed: int = 0,
    given: Given = NOTHING_GIVEN,
) -> dict[str, Any]:
    """A value for everything that is declared, by name: what a call passes, and what a reference reads.

    Args:
        declarations: of a spec.
        shape: of the call.
        device: where tensors shall be.
        seed: of what is drawn; a tensor's values do not depend on the others.
        given: what is said of some of them; names of other specs are passed over.

    Raises:
        ArgumentError: a scalar has neither default nor value, or a value, kind or file is none.
        MemoryError: this machine can never hold a tensor.
    """
    scalars = {
        scalar.name: _scalar(scalar, given.scalars.get(scalar.name))
        for scalar in declarations.scalars.values()
    }
    files = {
        name: _read(name, given.tensors[name], device)
        for name in declarations.tensors
        if given.tensors.get(name, KINDS[0]) not in KINDS
    }
    sizes: dict[str, int] = {**sizes_of(shape), **_sizes_of_blocks(declarations, shape)}
    for name, tensor in files.items():
        sizes = {**dict(zip(map(str, declarations.tensors[name].dims), tensor.shape, strict=False)), **sizes}
    for name, tensor in files.items():
        if declarations.tensors[name].is_sorted:
            check_sorted(declarations.tensors[name], tensor)
    drawn = {
        tensor.name: _draw(tensor, sizes, seed, given.tensors.get(tensor.name)).to(device)
        for tensor in declarations.tensors.values()
        if tensor.name not in files
    }
    return {**scalars, **{name: (files | drawn)[name] for name in declarations.tensors}}


def _sizes_of_blocks(declarations: Declarations, shape: Shape) -> dict[str, int]:
    """The sizes of a map of given blocks that has one for each head; none where there is no map."""
    if declarations.blocks is None:
        return {}
    block_m, block_n = declarations.blocks
    sizes = (shape.batch, shape.heads, -(-shape.seqlen_q // block_m), -(-shape.seqlen_k // block_n))
    return dict(zip(map(str, GIVEN_BLOCKS.dims), sizes, strict=True))


def _scalar(scalar: Scalar, text: str | None) -> Any:
    """The value that a text means, or the default."""
    cure = f"--scalar {scalar.name}=VALUE"
    if text is None and scalar.default is not None:
        return scalar.default
    if text is None:
        must = f"a value: the spec declares {scalar.type} without default"
        raise ArgumentError(scalar.name, "nothing", must, cure)
    value = read_default(scalar.type, text)
    if value is None:
        near = " or ".join(f"--scalar {scalar.name}={near}" for near in nearest_defaults(scalar.type, text))
        raise ArgumentError(scalar.name, shown(text), DEFAULTS[scalar.type], near or cure)
    return value


def _read(name: str, path: str, device: torch.device | str) -> torch.Tensor:
    """The tensor of a file."""
    near = get_close_matches(path, KINDS, n=1)
    cure = f"--tensor {name}={near[0]}" if near else f"torch.save(tensor, {shown(path)}) writes one"
    if not os.path.isfile(path):
        must = f"{', '.join(KINDS)}, or the path of a file"
        raise ArgumentError(f"--tensor {name}", shown(path), must, cure if near else None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says of old formats is nothing to the user
            found = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a stranger's file makes the reading machine raise anything at all
        reason = str(error).strip().partition("\n")[0].partition(". ")[0][:_MOST_SHOWN]
        reason = reason or type(error).__name__
        raise ArgumentError(f"--tensor {name}", f"{path} ({reason})", "a file with a tensor", cure) from error
    if not isinstance(found, torch.Tensor):
        raise ArgumentError(
            f"--tensor {name}", f"{path} with a {type(found).__name__}", "a file with a tensor", cure
        )
    if found.is_nested or found.layout != torch.strided or found.is_quantized or found.is_meta:
        got = f"{path} with a tensor that is nested, sparse, quantized or without data"
        raise ArgumentError(f"--tensor {name}", got, "a dense tensor (torch.strided)", cure)
    return found


def _draw(tensor: TensorType, sizes: Mapping[str, int], seed: int, kind: str | None) -> torch.Tensor:
    """One tensor, on the CPU."""
    dims = [dim if isinstance(dim, int) else sizes.get(dim, NEW_DIMENSION) for dim in tensor.dims]
    dtype = element_dtype(tensor.dtype)
    check_room(dtype.itemsize * math.prod(dims), f"{tensor.name}, {tuple(dims)}")
    kind = kind or ("sorted" if tensor.dtype in _INTEGERS else "random")
    if kind == "zeros":
        return torch.zeros(dims, dtype=dtype)
    if kind == "hashed" and tensor.dtype not in _INTEGERS:
        must = f"sorted, random or zeros: the spec declares {tensor}"
        raise ArgumentError(f"--tensor {tensor.name}", "hashed, which is for integers", must)
    if kind != "sorted" and tensor.is_sorted:
        must = f"sorted or zeros: the spec declares {tensor}"
        raise ArgumentError(f"--tensor {tensor.name}", kind, must)
    generator = torch.Generator().manual_seed(seed + zlib.crc32(tensor.name.encode()))
    if tensor.is_sorted:
        return _documents(dims, generator, 0 if tensor.dtype == "u8" else -IDS // 2).to(dtype)
    count = math.prod(dims)
    few = (min(count, MOST_DRAWN),)
    if tensor.dtype in _INTEGERS:
        numbers = torch.randint(0, IDS, few, generator=generator)
    elif tensor.dtype == "bool":
        numbers = torch.rand(few, generator=generator, dtype=torch.float32) < 0.5
    else:
        numbers = torch.randn(few, generator=generator, dtype=torch.float32)
    if few[0] < count:
        numbers = numbers.to(dtype).repeat(-(-count // few[0]))[:count]
    numbers = numbers.reshape(dims)
    if kind != "random" and numbers.numel():
        numbers = numbers.sort(dim=-1).values
    if kind == "hashed":
        numbers = (numbers + 1) * _HASH % _INTEGERS[tensor.dtype]
    return numbers.to(dtype)


def _documents(dims: Sequence[int], generator: torch.Generator, lowest: int) -> torch.Tensor:
    """Ids that rise from `lowest` at cuts anywhere along the last dimension, of which some may fall together."""
    *others, length = dims
    cuts = torch.randint(0, length + 1, (math.prod(others), IDS), generator=generator)
    begun = torch.zeros(len(cuts), length + 1, dtype=torch.int32).scatter_add_(
        1, cuts, torch.ones_like(cuts).int()
    )
    return (begun[:, :length].cumsum(1, dtype=torch.int32) + lowest).reshape(dims)
