"""A call's kernels as they are built: their texts and cubins, and what runs them."""

from functools import cached_property
from pathlib import Path
from typing import Any

from attngen.compiled_module import Module
from attngen.errors import ArgumentError, ToolchainError
from attngen.plan import Call, KernelPlan, Manifest, assemble
from attngen.runtime import CompiledKernel, CompilerPool, KernelResources, Launcher
from attngen.simulate import Simulator


class BuiltCall:
    """The kernels of a call, emitted and compiled when somebody asks.

    Attributes:
        call: what calls launch, with every number that was decided; of an edited source one kernel takes all calls.
        modules: texts and cubins by their names; that of the attention kernel for any length first.
    """

    def __init__(self, call: Call, lineinfo: bool = False, source: str | None = None) -> None:
        self.call = call if source is None else assemble((call.attention,))
        own = self.plan.module
        names = sorted(self.call.modules, key=lambda name: name != own)
        self.modules = {
            name: Module(name, self.call.modules[name], call.arch, lineinfo, source if name == own else None)
            for name in names
        }

    @property
    def plan(self) -> KernelPlan:
        """The attention kernel that takes calls of any length."""
        return self.call.attention

    @property
    def module(self) -> Module:
        """What that kernel stands in."""
        return self.modules[self.plan.module]

    @property
    def source(self) -> str:
        """The CUDA C++ text of `module`."""
        return self.module.source

    @property
    def manifest(self) -> Manifest:
        """What a launch needs to know."""
        return self.call.manifest

    @property
    def compiled(self) -> CompiledKernel:
        """The cubin of `module` and its report.

        Raises:
            ToolchainError: NVRTC is missing.
        """
        return self.module.compiled

    @property
    def resources(self) -> tuple[KernelResources, ...]:
        """Registers, spills and stack of each kernel of `module`."""
        return self.compiled.resources

    @property
    def was_cached(self) -> bool:
        """Whether the cubin of `module` came from the disk cache."""
        return self.compiled.was_cached

    @property
    def compile_seconds(self) -> float:
        """How long NVRTC took over `module`, when it did."""
        return self.compiled.seconds

    def compile(self) -> None:
        """Build what has not been built, all modules at the same time."""
        with CompilerPool() as pool:
            pool.each(lambda module: module.compiled, tuple(self.modules.values()))

    @cached_property
    def _launcher(self) -> Launcher:
        if not self.call.arch.emits:
            raise ToolchainError(
                f"target {self.call.arch.name} runs on CPU tensors only", "compile for the GPU's arch"
            )
        return Launcher(self.manifest, lambda module: self.modules[module].compiled.cubin)

    @cached_property
    def _simulator(self) -> Simulator:
        return Simulator(self.call)

    def _machine(self, q: Any) -> Launcher | Simulator:
        """What runs a call with this Q.

        Raises:
            ArgumentError: q is no tensor.
        """
        try:
            is_on_gpu = q.is_cuda
        except AttributeError:
            raise ArgumentError("q", type(q).__name__, "a torch tensor") from None
        return self._launcher if is_on_gpu else self._simulator

    def sass(self) -> str:
        """The machine code of `module`, disassembled."""
        return self.module.sass()

    def save(self, folder: str | Path) -> tuple[Path, ...]:
        """Write .cu and .cubin of every module, and NAME.json of the whole call, and return their paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        contents = {f"{self.plan.name}.json": self.manifest.to_json().encode()}
        for module in self.modules.values():
            contents[f"{module.name}.cu"] = module.source.encode()
            contents[f"{module.name}.cubin"] = module.compiled.cubin
        for name, data in contents.items():
            (folder / name).write_bytes(data)
        return tuple(folder / name for name in contents)
