"""Tables of extremes, boundaries and lists of tiles that outlive a call: what they were made of is remembered, and a
call that differs is refused.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from attngen.bind.arguments import Given
from attngen.errors import ArgumentError
from attngen.plan import Lengths, Manifest, sizes_in

_SIZES = ("batch", "seqlen_q", "seqlen_k", "num_heads_q", "num_heads_kv")
_SIZES_OF_LISTS = ("batch", "seqlen_q", "seqlen_k", "tokens_q", "tokens_k")
_SIZES_OF_PARTS = ("num_heads_q", "num_heads_kv")
"""What a list also depends on whose entries are for all heads of a group."""


class TableSignature(NamedTuple):
    """What calls that share tables have in common, but for where tensors are and what they hold.

    Attributes:
        kernel: name of the kernel that reads the tables, which fixes the grid of tiles.
        sizes: of the call; of a list of tiles those that it depends on.
        tensors: name, shape and strides of each tensor that it was made of, see `made_of`.
        scalars: name and value of each declared scalar, which lookups may have read; none of a list of tiles.
    """

    kernel: str
    sizes: tuple[tuple[str, int], ...]
    tensors: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    scalars: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, kernel: str, given: Given, manifest: Manifest) -> "TableSignature":
        """The signature of a call that this kernel takes."""
        lengths = manifest.lengths
        names: tuple[str, ...] = _SIZES if lengths.are_dense else _SIZES_OF_LISTS
        shapes = (size for name in manifest.kept for size in manifest.value_of[name].shape)
        if not lengths.are_dense and frozenset().union(*map(sizes_in, shapes)) & {"group", *_SIZES_OF_PARTS}:
            names = (*names, *_SIZES_OF_PARTS)
        return cls(
            kernel,
            tuple((name, given.sizes[name]) for name in names if name in given.sizes),
            tuple((name, tuple(x.shape), x.stride()) for name, x in made_of(given, lengths).items()),
            tuple(given.scalars.items()) if lengths.are_dense else (),
        )


def made_of(given: Given, lengths: Lengths) -> Mapping[str, torch.Tensor]:
    """The tensors of a call that tables are made of: what the spec declares; or a list of tiles, what says lengths."""
    if lengths.are_dense:
        return given.by_name
    return {each.name: given.tensors[each.name] for each in lengths.arguments if each.name in given.tensors}


@dataclass(eq=False)
class TileTables:
    """Extremes of declared tensors by tile, or boundaries, made by `attngen.Kernel.tables` and passed to calls as
    `tables`, or a list of tiles, made by `attngen.Kernel.work` and passed as `work`.

    Attributes:
        signature: of the calls that may use them.
        contents: address and version of each tensor they were made of.
        memory: the tables: of a GPU one after another, as the binder lays them out; of the simulator by value.
    """

    signature: TableSignature
    contents: tuple[tuple[int, int], ...]
    memory: torch.Tensor | Mapping[str, torch.Tensor]
    passed_as: Literal["tables", "work"] = "tables"

    @classmethod
    def of(
        cls,
        signature: TableSignature,
        tensors: Iterable[torch.Tensor],
        memory: torch.Tensor | Mapping[str, torch.Tensor],
        passed_as: Literal["tables", "work"],
    ) -> "TileTables":
        """The tables of a call that passes these tensors."""
        return cls(signature, _contents(tensors, passed_as), memory, passed_as)

    def check(self, signature: TableSignature, tensors: Iterable[torch.Tensor]) -> None:
        """Refuse tables that are not of the call that has this signature and passes these tensors.

        Raises:
            ArgumentError: names what differs.
        """
        if not isinstance(self, TileTables):  # whatever a caller passed
            raise ArgumentError("tables", type(self).__name__, "what kernel.tables(...) made")
        contents = _contents(tensors, self.passed_as)
        if self.signature != signature or self.contents != contents:
            self._refuse(signature, contents)

    def renew(self, signature: TableSignature, tensors: Iterable[torch.Tensor]) -> None:
        """Be what these tensors come to now, which the memory is about to be filled with.

        Raises:
            ArgumentError: they are not of calls of this signature.
        """
        if self.signature != signature:
            self._refuse(signature, self.contents)
        self.contents = _contents(tensors, self.passed_as)

    def _refuse(self, now: TableSignature, contents: tuple[tuple[int, int], ...]) -> None:
        made, argument = self.signature, self.passed_as
        cure = f"make {'it' if argument == 'work' else 'them'} anew with kernel.{argument}(...)"
        if made.kernel != now.kernel:
            raise ArgumentError(argument, f"{argument} of {made.kernel}", f"{argument} of {now.kernel}", cure)
        if made.sizes != now.sizes:
            got, must = (", ".join(f"{name} {size}" for name, size in each.sizes) for each in (made, now))
            raise ArgumentError(argument, f"{argument} of {got}", must, cure)
        if made.scalars != now.scalars:
            got, must = (str(dict(each.scalars)) for each in (made, now))
            raise ArgumentError(argument, f"{argument} made with {got}", must, cure)
        names = [", ".join(name for name, *_ in each.tensors) for each in (made, now)]
        if names[0] != names[1]:
            raise ArgumentError(argument, f"{argument} made of {names[0]}", f"{argument} of {names[1]}", cure)
        for (name, *was), (_, *has), was_in, is_in in zip(
            made.tensors, now.tensors, self.contents, contents, strict=True
        ):
            for what, old, new in zip(
                ("address", "version", "shape", "strides"), (*was_in, *was), (*is_in, *has), strict=True
            ):
                if old != new:
                    must = f"{what} {new}, as {name} has now"
                    raise ArgumentError(argument, f"{argument} of {name} with {what} {old}", must, cure)


def passed_as(manifest: Manifest) -> Literal["tables", "work"]:
    """The argument by which a call passes what an earlier one has kept."""
    return "tables" if manifest.lengths.are_dense else "work"


def _contents(tensors: Iterable[torch.Tensor], argument: str) -> tuple[tuple[int, int], ...]:
    """Address and version of each."""
    try:
        return tuple([(x.data_ptr(), x._version) for x in tensors])
    except RuntimeError:
        must = "tensors made outside of torch.inference_mode, whose writes are counted"
        raise ArgumentError(
            argument, "tensors of torch.inference_mode", must, f"pass no {argument}"
        ) from None
