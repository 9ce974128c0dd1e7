"""How a kernel of e4m3 inputs comes by its operands: out of 16-bit tensors, or of e4m3 tensors and their descales."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch

from attngen.emit import QuantizerEntries, quantizer_entries, quantizer_text
from attngen.errors import ArgumentError
from attngen.plan import Quantizer
from attngen.quantize import DESCALES, Operands, pack_values, quantize
from attngen.runtime import CompiledKernel, DiskCache, Problem, QuantizeLauncher, check_sources, check_values


class Quantization:
    """The kernels that quantise for one attention kernel, and torch in their place on the CPU.

    Attributes:
        quantizer: their numbers.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer

    @cached_property
    def source(self) -> str:
        """The CUDA C++ text of its kernels."""
        return quantizer_text(self.quantizer)

    @cached_property
    def compiled(self) -> CompiledKernel:
        """Their cubin; compiled at first use, or read from the disk cache."""
        return DiskCache().get(self.source, self.quantizer.arch.name)

    @property
    def manifest(self) -> str:
        """What a launch of its kernels needs to know, as JSON."""
        return json.dumps(asdict(self._entries), indent=1, sort_keys=True) + "\n"

    def check_sources(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str) -> Problem:
        """The problem of 16-bit tensors that a call would quantise; meta tensors will do."""
        return check_sources(self._entries, q, k, v, layout)

    @cached_property
    def _entries(self) -> QuantizerEntries:
        return quantizer_entries(self.quantizer)

    @cached_property
    def _launcher(self) -> QuantizeLauncher:
        return QuantizeLauncher(self._entries, self.compiled.cubin)

    def quantize(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str) -> Operands:
        """Operands out of 16-bit tensors; see `Kernel.quantize`."""
        if isinstance(q, torch.Tensor) and q.is_cuda:
            return self._launcher.quantize(q, k, v, layout)
        check_sources(self._entries, q, k, v, layout)
        if layout == "bhsd":
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return quantize(q, k, v, self.quantizer.scales, self.quantizer.hadamard_seed)

    def pack_values(self, v: torch.Tensor, layout: str) -> torch.Tensor:
        """e4m3 V of the usual layout as the attention kernel reads it."""
        if isinstance(v, torch.Tensor) and v.is_cuda:
            return self._launcher.pack_v(v, layout)
        check_values(self._entries, v, layout)
        return pack_values(v if layout == "bshd" else v.transpose(1, 2))

    def operands_of(
        self,
        q: torch.Tensor | Operands,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layout: str,
        passed: Mapping[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Mapping[str, Any]]:
        """What the attention kernel reads, of whatever a call may pass; arguments as of `Kernel.__call__`.

        Returns:
            q and k, e4m3 in the call's layout; v as of `Operands`; what is passed by name, descales among it.

        Raises:
            ArgumentError: an argument that none of the ways takes.
        """
        if isinstance(q, torch.Tensor) and q.dtype == torch.float8_e4m3fn:
            if not isinstance(k, torch.Tensor) or not isinstance(v, torch.Tensor):
                name, x = ("v", v) if isinstance(k, torch.Tensor) else ("k", k)
                raise ArgumentError(name, type(x).__name__, "a torch tensor")
            self._check_lengths(q, k, v)
            return q, k, self.pack_values(v, layout), self._spread(passed, q, k, layout)
        for name in DESCALES:
            if name in passed:
                raise ArgumentError(name, "descales", "none: q is quantised by the call, or has its own")
        if isinstance(q, Operands):
            for name, x in (("k", k), ("v", v)):
                if x is not None:
                    raise ArgumentError(name, type(x).__name__, "nothing beside operands of kernel.quantize")
            operands = q
            self._check_kind(operands)
        else:
            operands = self.quantize(q, k, v, layout)  # type: ignore[arg-type] # checked there
        rows = (operands.q, operands.k)
        q8, k8 = (x.transpose(1, 2) for x in rows) if layout == "bhsd" else rows
        return q8, k8, operands.v, {**passed, **{name: getattr(operands, name) for name in DESCALES}}

    def _check_lengths(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Refuse V of another length, batch or heads than K: once it is laid out, its length is padded."""
        for name, x in (("q", q), ("k", k)):
            if x.dim() != 4:
                raise ArgumentError(name, f"{x.dim()} dimensions", "4: (batch, seqlen, heads, head_dim)")
        expected = (*k.shape[:3], self.quantizer.head_dim_v)
        if tuple(v.shape) != expected:
            raise ArgumentError("v", f"shape {tuple(v.shape)}", f"{expected}, as k has it")

    def _spread(
        self, passed: Mapping[str, Any], q: torch.Tensor, k: torch.Tensor, layout: str
    ) -> Mapping[str, Any]:
        """What is passed, with a descale of one element for every head where tensors have one."""
        if self.quantizer.scales != "per_tensor":
            return passed
        size = (q.shape[0], k.shape[2 if layout == "bshd" else 1])
        single = {
            name: x.reshape(1, 1).expand(size)
            for name in DESCALES
            if isinstance(x := passed.get(name), torch.Tensor) and x.numel() == 1
        }
        return {**passed, **single}

    def _check_kind(self, operands: Operands) -> None:
        """Refuse operands whose scales or whose basis are another kernel's."""
        wanted = self.quantizer
        if operands.scales != wanted.scales:
            must = f"scales {wanted.scales}, as the spec has them"
            raise ArgumentError("q", f"operands with scales {operands.scales}", must)
        if operands.hadamard != (wanted.hadamard_seed is not None):
            basis, must = ("hadamard", "none") if operands.hadamard else ("none", "hadamard")
            raise ArgumentError(
                "q", f"operands of incoherent: {basis}", f"incoherent: {must}, as the spec has it"
            )
