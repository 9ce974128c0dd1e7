"""`merge_states`: results of attention to parts of the keys become that to all of them."""

from collections.abc import Sequence
from typing import Any

import torch

from attngen.bind import ROW_ALIGNMENT, check_alignment, check_no_derivative, check_plain
from attngen.capture import not_captured
from attngen.dtypes import DTYPES, DType, torch_dtype
from attngen.errors import ArgumentError, shown
from attngen.plan import sink_value
from attngen.serving.known_calls import KnownCalls, signature_of
from attngen.serving.lone_kernel import LARGEST_GRID, ReadyLaunch, arch_on, launcher_of
from attngen.serving.meanings import merged
from attngen.serving.merge_kernel import AXES, CHUNK, MOST_PARTS, MergeStates

LAYOUTS = ("bshd", "bhsd")
_CALLS = KnownCalls()
_FORMATS: dict[torch.dtype, DType] = {
    torch_dtype(DTYPES[name]): DTYPES[name] for name in ("f16", "bf16", "f32")
}
_Parts = Sequence[torch.Tensor]


@not_captured
def merge_states(
    outs: _Parts,
    lses: _Parts,
    sink: torch.Tensor | None = None,
    return_lse: bool = False,
    layout: str = "bshd",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Merge results of attention to parts of the keys, no key in two of them, into that to all keys.

    A part weighs e^lse: out is the sum of e^(lse_i - m) out_i over that of e^(lse_i - m), and lse m + ln of that, with
    m the largest lse_i. A part whose lse is infinite has no keys, and what its out holds there is not looked at: lse is
    -inf where kernels of attngen see no keys, and +inf where FlashAttention-3 sees none. A row without keys in any part
    has out 0 and lse -inf. Parts are folded in their order, in f32, so that the same bits come out in every run; with
    one part that has keys these are the part's own.

    A GPU takes one launch for 32 parts; more are merged in groups of so many to f32 first. It can be captured, and
    reads no number on the host. There is no backward pass.

    Args:
        outs: a tensor for each part, normalised, f16, bf16 or f32: (batch, seqlen, heads, head_dim), or of ragged
            sequences (tokens, heads, head_dim), last dimension contiguous; on a GPU head_dim is a multiple of 8 and
            rows start on 16 bytes. All of one shape and type, each of any other strides.
        lses: a tensor for each part, f32: natural logarithms, (batch, heads, seqlen) or (heads, tokens), as kernels
            return them; of any strides.
        sink: a learned sink, (heads), f32, bf16 or f16: a logit of each head that joins the sum once, without a value.
            The parts must be without it.
        return_lse: whether lse is returned too; with a sink it has that in it, as that of kernels has.
        layout: "bhsd" exchanges seqlen and heads in tensors of four dimensions; lse stays as it is.

    Returns:
        out, dense, of the parts' shape and type; or (out, lse).

    Raises:
        ArgumentError: parts that do not fit each other, or what no kernel takes; nothing was touched.
        ToolchainError: this machine cannot compile or run the kernel.
    """
    if not isinstance(return_lse, bool):
        raise ArgumentError("return_lse", shown(return_lse), "True or False")
    key: Any = None
    passed: tuple[Any, ...] = ()
    if isinstance(outs, list | tuple) and isinstance(lses, list | tuple) and len(outs) <= MOST_PARTS:
        passed = (*outs, *lses, *(() if sink is None else (sink,)))
        key = signature_of((*passed, len(outs), len(lses), layout))
    ready = _CALLS.find(key, passed)
    if ready is not None:
        out, lse = _started(ready, passed, len(outs), outs[0].dtype)
        return (out, lse) if return_lse else out
    _check_parts(outs, lses, layout)
    _check_sink(sink, outs[0], layout)
    dtype = outs[0].dtype
    while len(outs) > MOST_PARTS:
        groups = [slice(first, first + MOST_PARTS) for first in range(0, len(outs), MOST_PARTS)]
        of_groups = [_merge(outs[group], lses[group], None, layout, torch.float32) for group in groups]
        outs, lses = (list(column) for column in zip(*of_groups, strict=True))
    out, lse = _merge(outs, lses, sink, layout, dtype, key)
    return (out, lse) if return_lse else out


def _merge(
    outs: _Parts, lses: _Parts, sink: torch.Tensor | None, layout: str, dtype: torch.dtype, key: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge up to `MOST_PARTS` parts that have been checked, into out of a type, and lse.

    Args:
        outs: as of `merge_states`, like what follows.
        lses: see outs.
        sink: see outs.
        layout: see outs.
        dtype: of out.
        key: by which the launch is remembered; None where it is not.
    """
    first = outs[0]
    if not first.is_cuda:
        return merged(outs, lses, sink, layout, dtype)
    if not first.numel():
        return torch.empty_like(first, dtype=dtype), torch.empty_like(lses[0])
    kernel = MergeStates(arch_on(first.device), _FORMATS[first.dtype], _FORMATS[dtype])
    ready = launcher_of(kernel).prepare(first.device, *launch_of(kernel, outs, lses, sink, layout))
    tensors = _named(outs, lses, sink)
    _CALLS.learn(key, ready, tensors, dict.fromkeys(list(tensors)[: len(outs)], ROW_ALIGNMENT))
    return _started(ready, tuple(tensors.values()), len(outs), dtype)


def _started(
    ready: ReadyLaunch, passed: tuple[torch.Tensor, ...], parts: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Start a launch of so many parts, and return out, of a type, and lse."""
    made = (
        torch.empty_like(passed[0], dtype=dtype, memory_format=torch.contiguous_format),
        torch.empty_like(passed[parts], memory_format=torch.contiguous_format),
    )
    ready.start((*passed, *made))
    return made


def _named(outs: _Parts, lses: _Parts, sink: Any) -> dict[str, torch.Tensor]:
    """What is passed, by the names of values."""
    parts = {f"outs{part}": x for part, x in enumerate(outs)} | {
        f"lses{part}": x for part, x in enumerate(lses)
    }
    return parts if sink is None else parts | {sink_value(_FORMATS[sink.dtype].name): sink}


def launch_of(
    kernel: MergeStates, outs: _Parts, lses: _Parts, sink: torch.Tensor | None, layout: str
) -> tuple[list[str], dict[str, int | float], int]:
    """What a launch is told: the names of its tensors, those of out and lse at the end, numbers, and blocks.

    Args:
        kernel: which.
        outs: as of `merge_states`, checked, `MOST_PARTS` at most, like what follows.
        lses: see outs.
        sink: see outs.
        layout: see outs.

    Raises:
        ArgumentError: there are more elements than a kernel counts.
    """
    first = outs[0]
    if first.numel() // CHUNK > LARGEST_GRID:
        must = f"at most {CHUNK * LARGEST_GRID} elements"
        raise ArgumentError("outs[0]", f"{first.numel()} elements", must, "merge some sequences at a time")
    dense = _rows(torch.empty(first.shape, dtype=first.dtype, device="meta"), layout)
    numbers = _strides("out", dense)
    for part, (x, of_x) in enumerate(zip(outs, lses, strict=True)):
        numbers |= _strides(f"outs{part}", _rows(x, layout)) | _strides(f"lses{part}", _rows_of_lse(of_x))
    tensors = _named(outs, lses, sink)
    if sink is not None:
        numbers[f"{list(tensors)[-1]}.stride_0"] = sink.stride(0)
    batch, seqlen, heads, columns = dense.shape
    sizes = {
        "parts": len(outs),
        "batch": batch,
        "seqlen": seqlen,
        "num_heads": heads,
        "chunks": columns // CHUNK,
    }
    return [*tensors, "out", "lse"], numbers | sizes, -(-first.numel() // (CHUNK * kernel.threads))


def _rows(x: torch.Tensor, layout: str) -> torch.Tensor:
    """A view as (batch, seqlen, heads, head_dim); ragged rows are of one batch."""
    return x.unsqueeze(0) if x.dim() == 3 else x.transpose(1, 2) if layout == "bhsd" else x


def _rows_of_lse(lse: torch.Tensor) -> torch.Tensor:
    """A view of (batch, heads, seqlen) or (heads, tokens) as (batch, seqlen, heads)."""
    return (lse if lse.dim() == 3 else lse.unsqueeze(0)).transpose(1, 2)


def _strides(name: str, rows: torch.Tensor) -> dict[str, int | float]:
    """The steps of a value from row to row."""
    return {f"{name}.stride_{axis}": step for axis, step in zip(AXES, rows.stride(), strict=False)}


def _check_parts(outs: Any, lses: Any, layout: Any) -> None:
    """Refuse parts that are none, or that do not fit each other."""
    if layout not in LAYOUTS:
        raise ArgumentError("layout", shown(layout), " or ".join(map(repr, LAYOUTS)))
    for name, parts in (("outs", outs), ("lses", lses)):
        if not isinstance(parts, list | tuple):
            cure = f"pass {name}.unbind() of stacked ones" if isinstance(parts, torch.Tensor) else None
            raise ArgumentError(
                name, f"a {type(parts).__name__}", "a list of tensors, one for each part", cure
            )
    if not outs or len(lses) != len(outs):
        name, got = ("lses", len(lses)) if outs else ("outs", 0)
        must = (
            f"{len(outs)}, as many as outs" if outs else "one for each part, of which there is one at least"
        )
        raise ArgumentError(name, f"{got} tensors", must)
    for part, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        _check_out(f"outs[{part}]", out, outs[0])
        _check_lse(f"lses[{part}]", lse, outs[0], layout)


def _check_out(name: str, out: Any, first: torch.Tensor) -> None:
    check_plain(name, out)
    check_no_derivative(name, out)
    if out.dtype not in _FORMATS:
        raise ArgumentError(name, f"dtype {out.dtype}", " or ".join(map(str, _FORMATS)))
    if out.device.type not in ("cpu", "cuda"):
        raise ArgumentError(name, f"device {out.device}", "cpu or cuda")
    if out.dim() not in (3, 4):
        must = "4: (batch, seqlen, heads, head_dim), or 3: (tokens, heads, head_dim)"
        raise ArgumentError(name, f"{out.dim()} dimensions", must)
    if (out.shape, out.dtype, out.device) != (first.shape, first.dtype, first.device):
        described = [f"{x.dtype} of shape {tuple(x.shape)} on {x.device}" for x in (out, first)]
        raise ArgumentError(name, described[0], f"{described[1]}, as outs[0] is")
    step = CHUNK if out.is_cuda else 1
    if out.shape[-1] < 1 or out.shape[-1] % step:
        raise ArgumentError(name, f"head_dim {out.shape[-1]}", f"a multiple of {step}, at least {step}")
    if out.stride(-1) != 1 and out.shape[-1] > 1 and out.numel():
        must = "1 (contiguous head_dim)"
        raise ArgumentError(
            name, f"stride {out.stride(-1)} in the last dimension", must, f"pass {name}.contiguous()"
        )
    if out.is_cuda:
        check_alignment(name, out)


def _check_lse(name: str, lse: Any, out: torch.Tensor, layout: str) -> None:
    check_plain(name, lse)
    check_no_derivative(name, lse)
    batch, seqlen, heads, _ = _rows(out, layout).shape
    shape = (heads, seqlen) if out.dim() == 3 else (batch, heads, seqlen)
    if (lse.dtype, lse.shape, lse.device) != (torch.float32, shape, out.device):
        axes = "(heads, tokens)" if out.dim() == 3 else "(batch, heads, seqlen)"
        must = f"{torch.float32} of shape {shape} = {axes} on {out.device}"
        raise ArgumentError(name, f"{lse.dtype} of shape {tuple(lse.shape)} on {lse.device}", must)


def _check_sink(sink: Any, out: torch.Tensor, layout: str) -> None:
    if sink is None:
        return
    check_plain("sink", sink)
    check_no_derivative("sink", sink)
    heads = _rows(out, layout).shape[2]
    if sink.dtype not in _FORMATS or sink.shape != (heads,) or sink.device != out.device:
        must = f"{' or '.join(map(str, _FORMATS))} of shape ({heads},) = (heads,) on {out.device}"
        raise ArgumentError("sink", f"{sink.dtype} of shape {tuple(sink.shape)} on {sink.device}", must)
