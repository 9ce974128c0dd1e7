"""Who would take a call, and what memory and time each would need: attngen beside what programs do with torch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table

from attngen.check.cost_of_run import median_seconds, peak_bytes, warm_up
from attngen.check.declared_inputs import Given, declared_inputs
from attngen.check.inputs import Shape, random_like
from attngen.check.judging import draw
from attngen.check.problem import Problem, scale_of
from attngen.check.ways import CHUNK, eager, query_chunked, sdpa, sdpa_arguments
from attngen.cli.launched_memory import launched_bytes
from attngen.cli.output import seconds_text, size_text, table
from attngen.errors import ArgumentError, AttngenError, ToolchainError
from attngen.kernel import Kernel
from attngen.memory import check_room, is_out_of_memory, lack_of_memory

OURS = "attngen"
EAGER, CHUNKED = "eager", f"eager, {CHUNK} queries at a time"
YES = "yes"
_BYTES_OF_A_SCORE = 8
"""That eager attention has at least of each pair at once: two matrices, one of them in f32."""


@dataclass(frozen=True)
class Way:
    """What one way to compute a call comes to.

    Attributes:
        name: of the way.
        takes: whether it takes the call.
        told: what there is to say: why it does not, or by what it does.
        peak_bytes: the most memory at once beyond what the call passes; None where it does not take the call.
        seconds: the median of a run; None where it does not take the call, or there is nothing to time.
        is_measured: whether it was run; else peak_bytes is worked out.
    """

    name: str
    takes: bool
    told: str
    peak_bytes: int | None = None
    seconds: float | None = None
    is_measured: bool = True


@dataclass(frozen=True)
class _Call:
    """A call with its tensors, and how its pass is run."""

    kernel: Kernel
    problem: Problem
    leaves: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    dout: torch.Tensor | None
    passed: dict[str, Any]

    @property
    def device(self) -> torch.device:
        return self.leaves[0].device

    def whole(self, forward: Callable[[], torch.Tensor], is_heads_first: bool = True) -> Any:
        """One pass: out, and where they are wanted the gradients of q, k and v in its place."""
        with torch.set_grad_enabled(self.dout is not None):
            out = forward()
            if self.dout is None:
                return out
            dout = self.dout.transpose(1, 2) if is_heads_first else self.dout
            return torch.autograd.grad(out, self.leaves, dout.to(out.dtype))


def ways_of(kernel: Kernel, shape: Shape, said: Given, device: torch.device) -> list[Way]:
    """Each way, measured on a device where it takes the call.

    Args:
        kernel: attngen's; where its spec has gradients the passes are forward and backward, else forward.
        shape: of the call.
        said: of what the spec declares.
        device: of the tensors. attngen's memory is computed where that is no GPU, and there is no time of it.

    Raises:
        ArgumentError: sequences have lengths of their own, or each call says which blocks are kept.
    """
    if shape.cuts or kernel.spec.blocks is not None or kernel.plan.descales:
        must = (
            "a spec of dense sequences of one format, without given blocks: torch's functions know no others"
        )
        raise ArgumentError("--calls", kernel.spec.name, must)
    q, k, v = draw(kernel.plan, shape, device)
    dout = None
    if kernel.gradients:
        q, k, v = q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
        dout = random_like(q.new_empty((*q.shape[:-1], v.shape[-1])))
    passed = declared_inputs(kernel.spec.arguments, shape, device, given=said)
    problem = Problem(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        kernel.spec.mask_expr,
        scale_of(q, None),
        "bhsd",
        shape.seqlen_q,
        torch.arange(shape.seqlen_q, device=device),
        kernel.spec.score_expr,
        passed,
    )
    call = _Call(kernel, problem, (q, k, v), dout, passed)
    warm_up(device, q.dtype)
    return [
        _measured(call, EAGER, partial(eager, problem), holds_scores=True),
        _measured(call, CHUNKED, partial(query_chunked, problem)),
        *_sdpa(call),
        _ours(call),
    ]


def _sdpa(call: _Call) -> Iterator[Way]:
    """torch's scaled_dot_product_attention, by each of its backends."""
    from attngen.sdpa.torchs_backends import BACKENDS, TorchsCall  # which loads torch's compiler

    try:
        mask, is_causal = sdpa_arguments(call.problem)
    except (ToolchainError, MemoryError, RuntimeError) as fault:
        told = _told(fault)
        yield from (Way(f"sdpa: {name}", False, told) for name in BACKENDS)
        return
    problem = call.problem
    asked = TorchsCall(
        problem.q, problem.k, problem.v, mask, 0.0, is_causal, problem.group > 1, problem.softmax_scale
    )
    choice = asked.choice()
    for name, backend in BACKENDS.items():
        reasons, title = asked.reasons_against(name), f"sdpa: {name}"
        if reasons:
            yield Way(title, False, "; ".join(reasons))
            continue
        told = f"{YES}, torch's own choice" if choice == backend.name.lower() else YES
        told += "" if mask is None else f", with a mask of {size_text(mask.nbytes)} in memory"
        run = sdpa(problem, backend, mask, is_causal)
        held = 0 if mask is None else mask.nbytes
        yield _measured(call, title, run, told, held, holds_scores=name == "math")


def _ours(call: _Call) -> Way:
    kernel = call.kernel
    name = kernel.serving(call.leaves[1]).name
    if call.device.type == "cuda":
        return _measured(call, OURS, partial(kernel, *call.leaves, **call.passed), f"{YES}, by {name}")
    needs = launched_bytes(kernel, *call.leaves, call.passed)
    return Way(OURS, True, f"{YES}, by {name}", needs, is_measured=False)


def _measured(
    call: _Call,
    name: str,
    forward: Callable[[], Any],
    told: str = YES,
    held: int = 0,
    holds_scores: bool = False,
) -> Way:
    """A way that was run, or why it could not be.

    Args:
        call: that is computed.
        name: of the way.
        forward: gives out.
        told: what there is to say.
        held: bytes of what the call passes and another way has no use for.
        holds_scores: whether all scores are in memory at once, which may be more than this machine has.
    """
    run = partial(call.whole, forward, is_heads_first=name != OURS)
    try:
        if holds_scores and call.device.type == "cpu":
            pairs = call.problem.q[..., 0].numel() * call.problem.seqlen_k
            check_room(pairs * _BYTES_OF_A_SCORE, "its score matrix")
        peak = peak_bytes(run, call.device) + held
        return Way(name, True, told, peak, median_seconds(run, call.device))
    except (AttngenError, MemoryError, RuntimeError) as fault:
        if name == OURS and not isinstance(fault, AttngenError) and not is_out_of_memory(fault):
            raise  # of others torch refuses so
        return Way(name, False, _told(fault))


def _told(fault: Exception) -> str:
    """Why a way does not take a call, in a line."""
    if is_out_of_memory(fault):
        return f"out of memory: {lack_of_memory(fault)}"
    return str(fault).splitlines()[0]


def call_table(ways: list[Way]) -> Table:
    """A row a way."""
    rows = [
        (
            way.name,
            "-" if way.peak_bytes is None else size_text(way.peak_bytes),
            "-" if way.seconds is None else seconds_text(way.seconds),
            way.told if way.takes else f"no: {way.told}",
        )
        for way in ways
    ]
    return table(("", "memory", "time", "takes the call"), rows, numbers_from=4)


def notes(kernel: Kernel, device: torch.device) -> list[str]:
    """What a reader of figures must know."""
    of_pass = "forward and backward" if kernel.gradients else "forward"
    given = "q, k, v and the gradient of out" if kernel.gradients else "q, k and v"
    lines = [
        f"{of_pass}; memory is the most at once beyond {given}, as torch's allocator has it on {device.type}"
    ]
    if device.type != "cuda":
        where = "a GPU" if kernel.plan.arch.emits else "the simulator"
        lines.append(
            f"{OURS} is for {where}: its memory is what its launches allocate, worked out and not measured, and "
            f"there is no time of it on this machine"
        )
    return lines
