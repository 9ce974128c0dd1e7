"""The Python face: `compile` a spec into a `Kernel`, or call `attention` and let the tensors decide."""

import logging
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from attngen.arch import ARCHS, Arch, arch_for_capability
from attngen.autograd import is_differentiated
from attngen.bind import check_plain
from attngen.capture import CapturedKernel, fixed_size
from attngen.errors import ArgumentError, Diagnostic, SpecError, ToolchainError, shown
from attngen.expr import SINK
from attngen.expr.python import Expression, bound_by, check_text, joined
from attngen.few_queries import cut_into, tile_of_few
from attngen.kernel import Kernel
from attngen.lower import lower
from attngen.plan import DENSE, Axis, Lengths
from attngen.spec import INPUTS, Spec, load
from attngen.torch_state import autocast_dtype, constant, is_traced, is_transformed, may_be_watched

_LOG = logging.getLogger(__name__)
NOTHING: Mapping[str, Any] = {}
"""No proxy: torch.compile reads none after a dict of the caller's has been changed."""
SpecSource = Spec | Path | str | dict[str, Any]
_INPUTS = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}


def resolve_arch(spec: Spec, arch: str | None = None) -> Arch:
    """The arch a spec is lowered for: the one given, else the spec's target, else this machine's GPU.

    Raises:
        SpecError: no such arch, or the spec is not legal for it.
        ArgumentError: arch is no name.
        ToolchainError: the target is `auto` and there is no GPU to take it from.
    """
    name = spec.target if arch is None else arch
    if not isinstance(name, str):
        raise ArgumentError("arch", shown(name), f"a name: {', '.join(ARCHS)}")
    if name not in ("auto", *ARCHS):
        raise SpecError(
            (
                Diagnostic(
                    f"arch = {shown(name)} is not a target of attngen",
                    "target",
                    path="target",
                    value=name,
                    nearest=tuple(known for known in ARCHS if known.startswith(name[:4])) or tuple(ARCHS),
                ),
            )
        )
    spec.replace({"target": name})  # raises where the spec would not be legal with that target
    if name != "auto":
        return ARCHS[name]
    if torch.cuda.is_available():
        return arch_for_capability(torch.cuda.get_device_capability())
    raise ToolchainError(
        "target is auto and this machine has no CUDA GPU to take it from",
        f"name one: --arch (or arch=) {', '.join(ARCHS)}",
    )


def compile(spec: SpecSource, arch: str | None = None, lineinfo: bool = False) -> Kernel:
    """Lower a spec and make it callable; the cubin is built at first need, once per machine.

    Args:
        spec: a path, the name of a shipped spec, YAML text, a dict or a Spec. The mask and the score of a dict may be
            `attngen.Expression`s, which bring what they declare and the tensors that they hold.
        arch: overrides the spec's target.
        lineinfo: keep line numbers in the cubin for profilers.

    Raises:
        SpecError: the spec breaks rules; all of them are in the report.
        PlanError: no legal kernel; the report names the rule and the nearest valid values.
        ArgumentError: the mask or the score of a dict is no text.
    """
    loaded = load(spec)
    call = lower(loaded, resolve_arch(loaded, arch))
    bound = bound_by(spec.get("mask"), spec.get("score")) if isinstance(spec, Mapping) else {}
    kernel = Kernel(loaded, call, lineinfo, bound=bound)
    if call.arch.emits and torch.cuda.is_available():
        kernel.compile()  # so that a call never does
    return kernel


@constant
def _arch_of(device: torch.device) -> str:
    """The name of the arch that tensors of a device run on."""
    return arch_for_capability(torch.cuda.get_device_capability(device)).name


@lru_cache(maxsize=256)
def _kernel_for(
    inputs: str,
    head_dim_qk: int,
    head_dim_v: int,
    mask: str,
    score: str,
    scalars: tuple[tuple[str, str], ...],
    tensors: tuple[tuple[str, str], ...],
    arch: str,
    sink: str,
    gradients: tuple[str, ...],
    deterministic: bool,
    queries: str,
    keys: str,
    block_sizes: tuple[int, int] | None,
    cache: str,
    few_rows: int,
) -> Kernel:
    """The kernel of an `attention` call, by all that decides it."""
    kernel = compile(
        {
            "target": arch,
            "problem": {
                "head_dim": {"qk": head_dim_qk, "v": head_dim_v},
                "queries": queries,
                "keys": keys,
            },
            "precision": {"inputs": inputs, "cache": cache},
            "mask": mask,
            "score": score,
            "scalars": dict(scalars),
            "tensors": dict(tensors),
            "sink": sink,
            "gradients": list(gradients),
            "deterministic": deterministic,
            **cut_into(few_rows),
            "blocks": block_sizes and dict(zip(("block_m", "block_n"), block_sizes, strict=True)),
        }
    )
    _LOG.debug("%s serves calls with mask %s and score %s", kernel.plan.name, mask, score)
    return kernel


@constant
def _text_for(*wanted: Any) -> str:
    """The text of a kernel, of which torch.compile sees nothing else; arguments are those of `_kernel_for`."""
    return _kernel_for(*wanted).text


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: str = "full",
    score: str = "score",
    *,
    scalars: Mapping[str, str] | None = None,
    tensors: Mapping[str, str] | None = None,
    deterministic: bool = True,
    sink: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention with the kernel that the tensors and the mask ask for, compiled once and remembered.

    Args:
        q: as for `Kernel.__call__`, like k and v. CPU tensors run on the simulator. Where one of the three, the sink or
            what the score reads requires grad, the kernel has a backward pass. k and v may be e4m3 beside q of 16 bits,
            with k_descale and v_descale among the options.
        k: see q.
        v: see q.
        mask: an expression of the mask language, or a name of its prelude; or an `attngen.Expression`, which
            brings what it declares and the tensors that it holds.
        score: a score expression, likewise.
        scalars: types of scalars by name, as in a spec: `{"cap": "f32 = 30.0"}`.
        tensors: formats and dimensions of tensors by name, as in a spec: `{"slopes": "f32[num_heads_q]"}`.
        deterministic: as in a spec; False allows sums in any order: of dQ, and of lookups without room for a table.
        sink: a learned sink, (num_heads_q), f32, bf16 or f16: a logit of each head that joins the sum without a value.
        **options: the other arguments of `Kernel.__call__`, with a value for each scalar and tensor.

    Raises:
        ArgumentError: a tensor that no kernel takes, a mask or score that is no text, or two declarations of one name
            that are not the same.
        SpecError: a fault in mask or score.
    """
    for name, text in (("mask", mask), ("score", score)):
        check_text(name, text)
    passed = {**bound_by(mask, score), **options, **({} if sink is None else {SINK: sink})}
    kernel = kernel_of_call(
        q,
        k,
        v,
        mask.text if isinstance(mask, Expression) else mask,
        score.text if isinstance(score, Expression) else score,
        scalars=joined("scalars", scalars, mask, score),
        tensors=joined("tensors", tensors, mask, score),
        passed=passed,
        deterministic=deterministic,
    )
    return kernel(q, k, v, **passed)


def kernel_of_call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: str = "full",
    score: str = "score",
    *,
    scalars: Mapping[str, str] = NOTHING,
    tensors: Mapping[str, str] = NOTHING,
    passed: Mapping[str, Any] = NOTHING,
    deterministic: bool = True,
    lengths: Lengths = DENSE,
    block_sizes: tuple[int, int] | None = None,
    may_split: bool = True,
) -> Kernel | CapturedKernel:
    """The kernel that the tensors and the mask of a call ask for, compiled once and remembered.

    Args:
        q: as for `Kernel.__call__`, like k and v.
        k: see q.
        v: see q.
        mask: an expression.
        score: an expression.
        scalars: types of scalars by name, as in a spec.
        tensors: formats and dimensions of tensors by name, as in a spec.
        passed: what the call passes by name, a sink too; what of it the score reads has a gradient where it requires
            one.
        deterministic: as in a spec.
        lengths: how queries and keys are cut into sequences.
        block_sizes: rows and keys of the blocks of which a call says which are kept; None where all are.
        may_split: whether keys may be cut into parts, so that bits depend on what other sequences there are.

    Raises:
        ArgumentError: a tensor that no kernel takes, or of keys in pages one that requires grad.
        SpecError: a fault in mask or score.
    """
    of_axes: tuple[tuple[str, torch.Tensor, Axis], ...] = (("q", q, "queries"), ("v", v, "keys"))
    is_seen = torch.compiler.is_dynamo_compiling() or may_be_watched(q)
    for name, x, axis in of_axes:
        if not (is_seen and (is_traced(x) or is_transformed(x))):
            check_plain(name, x)
        dims = 3 if lengths.of(axis) == "ragged" else 4
        if x.dim() != dims:
            raise ArgumentError(name, "another number of dimensions", str(dims))
    dtype = autocast_dtype(q) if is_seen or torch._C._is_any_autocast_enabled() else q.dtype
    if dtype not in _INPUTS:
        raise ArgumentError("q", f"dtype {q.dtype}", " or ".join(str(known) for known in _INPUTS))
    cache = "e4m3" if getattr(k, "dtype", None) is torch.float8_e4m3fn else "auto"
    if cache == "e4m3" and dtype is torch.float32:
        raise ArgumentError("q", f"dtype {q.dtype}", "torch.float16 or torch.bfloat16 beside k of e4m3")
    if lengths.is_paged("keys") or cache == "e4m3":
        what = "keys in pages" if lengths.is_paged("keys") else "keys of e4m3"
        _check_no_gradients(what, {"q": q, "k": k, "v": v, **passed})
    gradients = _differentiated(q, k, v, score, passed)
    arch, few_rows = _arch_of(q.device) if q.is_cuda else "simulator", 0
    if not is_seen and not gradients and may_split:
        few_rows = tile_of_few(
            q, k, v, (mask, score), lengths, passed, ARCHS[arch].emits and bool(ARCHS[arch].wgmma)
        )
    wanted = (
        _INPUTS[dtype],
        fixed_size(q.shape[-1]) if is_seen else q.shape[-1],
        fixed_size(v.shape[-1]) if is_seen else v.shape[-1],
        mask,
        score,
        tuple(scalars.items()),
        tuple(tensors.items()),
        arch,
        "per_head" if passed.get(SINK) is not None else "none",
        gradients,
        deterministic,
        lengths.queries,
        lengths.keys,
        block_sizes,
        cache,
        few_rows,
    )
    if is_seen and torch.compiler.is_dynamo_compiling():
        return CapturedKernel(_text_for(*wanted), gradients, dtype)
    return _kernel_for(*wanted)


def _check_no_gradients(what: str, passed: Mapping[str, Any]) -> None:
    """Refuse what requires grad beside keys that have no gradients."""
    for name, x in passed.items():
        if is_differentiated(x):
            must = f"one that does not: {what} have no backward pass"
            raise ArgumentError(name, "a tensor that requires grad", must, "call under torch.no_grad()")


def _differentiated(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, score: str, passed: Mapping[str, Any]
) -> tuple[str, ...]:
    """What gradients are wanted of: nothing, or q, k, v and what the score names, or a sink, that requires grad."""
    declared = [name for name, value in passed.items() if is_differentiated(value)]
    named = [name for name in declared if name == SINK or _reads(score, name)]
    return (*INPUTS, *named) if named or is_differentiated(q, k, v) else ()


@constant
def _reads(score: str, name: str) -> bool:
    """Whether a score names a value."""
    return re.search(rf"\b{re.escape(name)}\b", score) is not None
