"""Tables of extremes that outlive a call: what they were made of is remembered, and a call that differs is refused."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attngen.emit.manifest import Manifest
from attngen.errors import ArgumentError

_SIZES = ("batch", "seqlen_q", "seqlen_k", "num_heads_q", "num_heads_kv")


@dataclass(frozen=True)
class TileTables:
    """Extremes of declared tensors by tile, made by `attngen.Kernel.tables` and passed to calls as `tables`.

    Attributes:
        kernel: name of the kernel that reads them, which fixes the grid of tiles.
        sizes: of the calls that may use them.
        sources: name, address, shape, strides and version of each tensor they were made of.
        scalars: what lookups may have read.
        workspaces: the tables, by name.
    """

    kernel: str
    sizes: tuple[int, ...]
    sources: tuple[tuple[Any, ...], ...]
    scalars: tuple[tuple[str, Any], ...]
    workspaces: Mapping[str, torch.Tensor]

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        sizes: Mapping[str, int],
        declared: Mapping[str, Any],
        workspaces: Mapping[str, torch.Tensor],
    ) -> "TileTables":
        """The tables of a call, or what tables of it would have to be."""
        return cls(manifest.name, *_signature(manifest, sizes, declared), workspaces)

    def check(self, manifest: Manifest, sizes: Mapping[str, int], declared: Mapping[str, Any]) -> None:
        """Refuse tables that are not of this call.

        Raises:
            ArgumentError: names what differs.
        """
        if not isinstance(self, TileTables):  # whatever a caller passed
            raise ArgumentError("tables", type(self).__name__, "what kernel.tables(...) made")
        cure = "make them anew with kernel.tables(...)"
        if self.kernel != manifest.name:
            raise ArgumentError("tables", f"tables of {self.kernel}", f"tables of {manifest.name}", cure)
        at, sources, scalars = _signature(manifest, sizes, declared)
        if at != self.sizes:
            got, must = (", ".join(map("{} {}".format, _SIZES, found)) for found in (self.sizes, at))
            raise ArgumentError("tables", f"tables of {got}", must, cure)
        if scalars != self.scalars:
            raise ArgumentError("tables", f"tables made with {dict(self.scalars)}", str(dict(scalars)), cure)
        for made, now in zip(self.sources, sources, strict=True):
            for what, was, has in zip(
                ("name", "address", "shape", "strides", "version"), made, now, strict=True
            ):
                if was != has:
                    must = f"{what} {has}, as {now[0]} has now"
                    raise ArgumentError("tables", f"tables of {now[0]} with {what} {was}", must, cure)


def _signature(
    manifest: Manifest, sizes: Mapping[str, int], declared: Mapping[str, Any]
) -> tuple[tuple[int, ...], tuple[tuple[Any, ...], ...], tuple[tuple[str, Any], ...]]:
    tensors = [(entry.name, declared[entry.name]) for entry in manifest.tensors]
    sources = tuple((name, x.data_ptr(), tuple(x.shape), x.stride(), x._version) for name, x in tensors)
    scalars = tuple((entry.name, declared.get(entry.name, entry.default)) for entry in manifest.scalars)
    return tuple(sizes[name] for name in _SIZES), sources, scalars
