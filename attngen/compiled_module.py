"""A module of a call: the kernels of one text, the text and its cubin, each made at first use."""

from collections.abc import Sequence
from functools import cached_property

from attngen.arch import Arch
from attngen.emit import emit_module
from attngen.plan import KernelPlan, Sheet
from attngen.runtime import CompiledKernel, DiskCache, disassemble


class Module:
    """Kernels of a call that stand in one text and one cubin.

    Attributes:
        name: of the files.
        kernels: what it holds; none of a text that is not emitted.
    """

    def __init__(
        self,
        name: str,
        kernels: Sequence[KernelPlan | Sheet],
        arch: Arch,
        lineinfo: bool = False,
        source: str | None = None,
    ) -> None:
        self.name = name
        self.kernels = kernels
        self._arch = arch
        self._lineinfo = lineinfo
        self._edited = source

    @cached_property
    def source(self) -> str:
        """The CUDA C++ text: emitted, or the edited one that was given in its place."""
        return emit_module(self.kernels) if self._edited is None else self._edited

    @cached_property
    def compiled(self) -> CompiledKernel:
        """The cubin and its report; compiled at first use, or read from the disk cache.

        Raises:
            ToolchainError: NVRTC is missing.
        """
        return DiskCache().get(self.source, self._arch.name, lineinfo=self._lineinfo)

    def sass(self) -> str:
        """The machine code, disassembled at first use."""
        return self._sass

    @cached_property
    def _sass(self) -> str:
        return disassemble(self.compiled.cubin)
