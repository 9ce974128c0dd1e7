"""A spec, lowered: what is emitted and compiled of it, and the call."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from attngen.emit import Manifest, emit, manifest, serving
from attngen.errors import ArgumentError, ToolchainError
from attngen.plan import Plan
from attngen.quantization import Quantization
from attngen.quantize import Operands
from attngen.runtime import (
    CompiledKernel,
    CompilerPool,
    DiskCache,
    KernelResources,
    Launcher,
    LaunchReport,
    TableSignature,
    TileTables,
    check_arguments,
    check_declared,
    check_length,
    check_overlap,
    check_writable,
    disassemble,
    explain_launch,
    softmax_scale_of,
)
from attngen.simulate import Progress, closed_form, simulate
from attngen.spec import Spec
from attngen.torch_state import torch_defaults


class Kernel:
    """A spec, lowered for one arch: callable on CUDA tensors (the cubin) and on CPU tensors (the simulator).

    Attributes:
        spec: what was asked for.
        plan: every number that was decided.
        shorter: kernels that take the calls of fewer keys, the fewest first; an edited source takes all calls.
        quantization: the kernels that make e4m3 operands; None where inputs are none.
        bound: tensors of the spec's expressions, which a call passes by itself where it is given no others.
    """

    def __init__(
        self,
        spec: Spec,
        plan: Plan,
        lineinfo: bool = False,
        source: str | None = None,
        bound: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.spec = spec
        self.bound = bound or {}
        self.plan = plan
        self._lineinfo = lineinfo
        self._edited = source
        plans = plan.shorter if source is None else ()
        self.shorter = tuple(Kernel(spec, shorter, lineinfo) for shorter in plans)
        self.quantization = Quantization(plan.quantizer) if plan.quantizer else None

    def __repr__(self) -> str:
        return f"<attngen.Kernel {self.plan.name}>"

    @cached_property
    def source(self) -> str:
        """The CUDA C++ text: emitted, or the edited one that was given in its place."""
        return emit(self.plan) if self._edited is None else self._edited

    @cached_property
    def manifest(self) -> Manifest:
        """What a launch needs to know."""
        return manifest(self.plan)

    @cached_property
    def compiled(self) -> CompiledKernel:
        """The cubin and its report; compiled at first use, or read from the disk cache.

        Raises:
            ToolchainError: NVRTC is missing.
        """
        return DiskCache().get(self.source, self.plan.arch.name, lineinfo=self._lineinfo)

    @property
    def resources(self) -> tuple[KernelResources, ...]:
        """Registers, spills and stack of each kernel, without those of `shorter`."""
        return self.compiled.resources

    @property
    def was_cached(self) -> bool:
        """Whether the cubin came from the disk cache."""
        return self.compiled.was_cached

    @property
    def compile_seconds(self) -> float:
        """How long NVRTC took, when it did."""
        return self.compiled.seconds

    def serving(self, k: torch.Tensor, layout: str = "bshd") -> "Kernel":
        """Which kernel takes a call with this K: itself or one of `shorter`.

        Raises:
            ArgumentError: k or layout is not what a call may pass.
        """
        return serving(self, self.shorter, check_length(k, layout))

    def compile(self) -> None:
        """Build what has not been built, `shorter` too and at the same time."""
        parts = (self, *self.shorter, *((self.quantization,) if self.quantization else ()))
        with CompilerPool() as pool:
            pool.each(lambda part: part.compiled, parts)

    @cached_property
    def _launcher(self) -> Launcher:
        if not self.plan.arch.emits:
            raise ToolchainError(
                f"target {self.plan.arch.name} runs on CPU tensors only", "compile for the GPU's arch"
            )
        return Launcher(
            self.manifest, self.compiled.cubin, tuple(kernel._launcher for kernel in self.shorter)
        )

    def __call__(
        self,
        q: torch.Tensor | Operands,
        k: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
        softmax_scale: float | None = None,
        return_lse: bool = False,
        out: torch.Tensor | None = None,
        layout: str = "bshd",
        tables: TileTables | None = None,
        **declared: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Compute attention.

        Args:
            q: (batch, seqlen_q, num_heads_q, head_dim_qk), the spec's input type, last dimension contiguous,
                rows on 16 bytes. Of a kernel of e4m3 inputs also bf16 or f16, which the call quantises, or the
                operands of `quantize`, in place of all three.
            k: (batch, seqlen_k, num_heads_kv, head_dim_qk); num_heads_kv divides num_heads_q.
            v: (batch, seqlen_k, num_heads_kv, head_dim_v).
            softmax_scale: any finite number, numpy's and 0-dimensional CPU tensors too; 1/sqrt(head_dim_qk) where None.
            return_lse: also return the natural log-sum-exp of every row.
            out: (batch, seqlen_q, num_heads_q, head_dim_v) to write to; allocated where None.
            layout: "bhsd" exchanges seqlen and heads in q, k, v and out.
            tables: of `Kernel.tables`, for a mask that reads tensors; made anew by every call that passes none.
            **declared: the scalars and tensors that the spec declares, by name; scalars with a default may be left
                out. With e4m3 tensors also q_descale, k_descale and v_descale, f32: what their values are multiplied
                by, of the shapes that `Operands` has; they are trusted to be positive.

        Returns:
            out, or (out, lse) with lse (batch, num_heads_q, seqlen_q), f32; a row that sees no key is 0 and -inf.

        Raises:
            ArgumentError: an argument the kernel cannot take; nothing was touched.
            ToolchainError: this machine cannot run the kernel.
        """
        if isinstance(out, torch.Tensor):
            check_writable(out)  # before anything is quantised, and in the mode of the call
        q8, k8, v8, passed = self._operands(q, k, v, layout, declared)
        try:
            is_on_gpu = q8.is_cuda
        except AttributeError:
            raise ArgumentError("q", type(q8).__name__, "a torch tensor") from None
        run = self._launcher.run if is_on_gpu else self._simulate
        result, lse = run(q8, k8, v8, softmax_scale, return_lse, out, layout, passed, tables)
        return result if lse is None else (result, lse)

    def _operands(
        self, q: Any, k: Any, v: Any, layout: str, declared: Mapping[str, Any]
    ) -> tuple[Any, Any, Any, Mapping[str, Any]]:
        """What the attention kernel itself is passed: tensors of its input type, and everything by name."""
        declared = {**self.bound, **declared} if self.bound else declared
        if self.quantization is None:
            return q, k, v, declared
        return self.quantization.operands_of(q, k, v, layout, declared)

    def _simulate(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        softmax_scale: float | None,
        return_lse: bool,
        out: torch.Tensor | None,
        layout: str,
        declared: Mapping[str, Any],
        tables: TileTables | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Out and, if it is asked for, lse of CPU tensors of the kernel's input type."""
        if q.device.type != "cpu":
            raise ArgumentError("q", f"device {q.device}", "a CUDA or a CPU tensor")
        problem = check_arguments(self.manifest, q, k, v, softmax_scale, out, layout)
        values = check_declared(self.manifest, declared, problem.sizes, q.device)
        if out is not None:
            check_overlap(out, values.tensors | values.descales)
        served = serving(self, self.shorter, problem.seqlen_k)
        if tables is not None:
            signature = TableSignature.of(served.manifest, problem.sizes, values)
            TileTables.check(tables, signature, values.tensors.values())
        passed = values.scalars | values.tensors

        def flops() -> int:
            lengths, heads = (problem.seqlen_q, problem.seqlen_k), (problem.num_heads_q, problem.num_heads_kv)
            return closed_form(served.plan, *lengths, problem.batch, *heads, declared=passed).flops

        with Progress(flops) as progress:
            result, lse = simulate(
                served.plan,
                q,
                k,
                v,
                softmax_scale=None if softmax_scale is None else softmax_scale_of(softmax_scale),
                return_lse=return_lse,
                layout=layout,
                memory=progress,
                declared=passed,
                descales=values.descales,
            )
        if out is None:
            return result, lse
        with torch_defaults(), torch.inference_mode(out.is_inference()):  # where alone it may be written
            return out.copy_(result), lse

    def tables(
        self,
        q: torch.Tensor | Operands,
        k: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
        layout: str = "bshd",
        **declared: Any,
    ) -> TileTables:
        """What a mask wants to know of declared tensors, by tile: worked out once for many calls.

        Calls may pass it as long as their sizes are these, and the tensors and their values too; a tensor that was
        written to in between is refused. Arguments are those of a call; e4m3 kernels quantise 16-bit tensors for it, so
        pass them operands.

        Raises:
            ArgumentError: an argument the kernel cannot take, or the kernel reads no tables.
        """
        if not self.manifest.tables:
            raise ArgumentError(
                "self", f"the mask {self.plan.mask_text}", "a mask that reads tensors by pair"
            )
        q8, k8, v8, passed = self._operands(q, k, v, layout, declared)
        if isinstance(q8, torch.Tensor) and q8.is_cuda:
            return self._launcher.tables(q8, k8, v8, layout, passed)
        problem = check_arguments(self.manifest, q8, k8, v8, None, None, layout)
        values = check_declared(self.manifest, passed, problem.sizes, q8.device)
        served = serving(self, self.shorter, problem.seqlen_k)
        signature = TableSignature.of(served.manifest, problem.sizes, values)
        return TileTables.of(signature, values.tensors.values())  # the simulator makes its own

    def quantize(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str = "bshd") -> Operands:
        """The e4m3 operands of a call, to pass to calls in the place of q, k and v.

        Args:
            q: (batch, seqlen_q, num_heads_q, head_dim_qk), bf16 or f16, last dimension contiguous, rows on 16 bytes.
            k: (batch, seqlen_k, num_heads_kv, head_dim_qk), of the same type.
            v: (batch, seqlen_k, num_heads_kv, head_dim_v), of the same type.
            layout: "bhsd" exchanges seqlen and heads; the operands are the same.

        Raises:
            ArgumentError: the kernel's inputs are not e4m3, or an argument is not what it takes.
        """
        if self.quantization is None:
            raise ArgumentError("self", f"a kernel of {self.plan.inputs.name} inputs", "one of e4m3 inputs")
        return self.quantization.quantize(q, k, v, layout)

    def sass(self) -> str:
        """The machine code, disassembled."""
        return disassemble(self.compiled.cubin)

    def explain_launch(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str = "bshd"
    ) -> tuple[LaunchReport, ...]:
        """What a call on these tensors (of any device, meta too) would launch to attend.

        Of a kernel of e4m3 inputs the tensors are bf16 or f16; what quantises them is not among the reports.
        """
        if self.quantization is not None:
            problem = self.quantization.check_sources(q, k, v, layout)
        else:
            problem = check_arguments(self.manifest, q, k, v, None, None, layout)
        return explain_launch(serving(self, self.shorter, problem.seqlen_k).manifest, problem)

    def save(self, folder: str | Path) -> tuple[Path, ...]:
        """Write NAME.cu, .json and .cubin, those of `shorter` and NAME_quantize.* too, and return their paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        contents: dict[str, bytes] = {
            ".cu": self.source.encode(),
            ".json": self.manifest.to_json().encode(),
            ".cubin": self.compiled.cubin,
        }
        if self.quantization is not None:
            contents["_quantize.cu"] = self.quantization.source.encode()
            contents["_quantize.json"] = self.quantization.manifest.encode()
            contents["_quantize.cubin"] = self.quantization.compiled.cubin
        for suffix, data in contents.items():
            path = folder / f"{self.plan.name}{suffix}"
            path.write_bytes(data)
            written.append(path)
        return (*written, *(path for kernel in self.shorter for path in kernel.save(folder)))
