"""The operators `attngen::attention...`: what torch's compiler, its export, its modes and its graphs see of a call.

A text names the kernel (`attngen.kernels_by_text`), so that a graph that was saved finds it in another process. The
face of eager calls goes past these operators, which cost more than a launch (`attngen.torch_state.is_watched`).
"""

import json
import logging
from functools import lru_cache
from itertools import compress
from typing import Any, NoReturn

import torch

from attngen.api import compile
from attngen.autograd import needed_gradients, refuse_second_derivatives, to_declared
from attngen.capture import Packed, capture_gradients, unpack
from attngen.dtypes import element_dtype
from attngen.errors import ArgumentError, ToolchainError
from attngen.kernel import Kernel
from attngen.kernels_by_text import LIVE

_LOG = logging.getLogger(__name__)
_PACKED = "str form, float? softmax_scale, Tensor[] tensors, bool[] flags, SymInt[] integers, float[] reals"
_CALL = f"Tensor q, Tensor k, Tensor v, str kernel, {_PACKED}"
_STRIDES = getattr(
    torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order
)  # older torch has not both
_TAGS = (torch.Tag.pt2_compliant_tag, _STRIDES)

LIBRARY = torch.library.Library("attngen", "DEF")  # type: ignore[no-untyped-call]
"""What holds the operators: they go where it goes."""
_BACKWARD = f"Tensor? dout, Tensor? dlse, Tensor out, Tensor lse, bool[] needed, {_CALL}"
for schema in (
    f"attention({_CALL}) -> Tensor",
    f"attention_with_lse({_CALL}) -> (Tensor, Tensor)",
    f"attention_backward({_BACKWARD}) -> Tensor[]",
):
    LIBRARY.define(schema, tags=_TAGS)  # type: ignore[no-untyped-call]


def find(text: str) -> Kernel:
    """The kernel that a text names: one of this process, else it is compiled.

    Raises:
        ToolchainError: the kernel has an edited source, which only the process has that made it.
    """
    return LIVE.get(text) or _compiled(text)


@lru_cache(maxsize=256)
def _compiled(text: str) -> Kernel:
    made_of = json.loads(text)
    if "source" in made_of:
        raise ToolchainError(
            f"{made_of['kernel']} has an edited source, and no kernel of this process has it",
            "make the kernel again, and keep it as long as what was captured of its calls",
        )
    _LOG.info("compiling %s, which a graph names", made_of["kernel"])
    return compile(made_of["spec"], made_of["arch"])


def _run(wanted: tuple[str, ...], q: Any, k: Any, v: Any, kernel: str, *packed: Any) -> list[torch.Tensor]:
    call = unpack(Packed(*packed))
    return find(kernel).make(wanted, q, k, v, call.softmax_scale, call.layout, call.named, call.intake)


def attention(*call: Any) -> torch.Tensor:
    """Out of a call; arguments are those of the schema."""
    return _run(("out",), *call)[0]


def attention_with_lse(*call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Out and lse of a call; arguments are those of the schema."""
    out, lse = _run(("out", "lse"), *call)
    return out, lse


def attention_backward(
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    needed: list[bool],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kernel: str,
    *packed: Any,
) -> list[torch.Tensor]:
    """The gradients that are needed of those that a kernel makes, in order: of q, k, v, and what its spec names."""
    call = unpack(Packed(*packed))
    given = (dout, dlse, q, k, v, out, lse, call.named, call.softmax_scale, call.layout)
    made = needed_gradients(find(kernel), needed, *given, keeps=False)
    return [x for x in made if x is not None]


def fake_attention(q: Any, k: Any, v: Any, kernel: str, *packed: Any) -> torch.Tensor:
    """Out without numbers: dense, whatever the strides of q are."""
    manifest = find(kernel).manifest
    made: torch.Tensor = q.new_empty(
        (*q.shape[:-1], manifest.head_dim_v), dtype=element_dtype(manifest.output)
    )
    return made


def fake_attention_with_lse(*call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Out and lse without numbers."""
    q, layout = call[0], unpack(Packed(*call[4:])).layout
    heads = 1 if q.dim() == 4 and layout == "bhsd" else q.dim() - 2
    seqlen = {4: 3 - heads, 3: 0}[q.dim()]
    shape = (*q.shape[: q.dim() - 3], q.shape[heads], q.shape[seqlen])
    return fake_attention(*call), q.new_empty(shape, dtype=torch.float32)


def fake_attention_backward(
    dout: Any, dlse: Any, out: Any, lse: Any, needed: list[bool], *call: Any
) -> list[torch.Tensor]:
    """Gradients without numbers: dense, of the shapes of what they are gradients of."""
    q, k, v, text = call[:4]
    kernel, named = find(text), unpack(Packed(*call[4:])).named
    value_of = kernel.manifest.value_of
    of_declared = (named.get(name) for name in kernel.declared_gradients)
    shapes = [x.shape if isinstance(x, torch.Tensor) else () for x in (q, k, v, *of_declared)]
    return [
        q.new_empty(shape, dtype=element_dtype(value_of[name].dtype))
        for name, shape, is_needed in zip(kernel.gradients_of(named), shapes, needed, strict=True)
        if is_needed
    ]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Keep what the backward pass takes."""
    q, k, v, kernel, *packed = inputs
    ctx.packed = Packed(*packed)
    ctx.kernel = kernel
    ctx.save_for_backward(*output, q, k, v, *ctx.packed.tensors)
    ctx.packed = ctx.packed._replace(tensors=())
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[Any, ...]:
    """The gradients of an operator's arguments, by another operator."""
    if torch.is_grad_enabled():
        refuse_second_derivatives()
    out, lse, q, k, v, *tensors = ctx.saved_tensors
    packed: Packed = ctx.packed._replace(tensors=tensors)
    names = find(ctx.kernel).gradients
    of_inputs, of_tensors = ctx.needs_input_grad[:3], ctx.needs_input_grad[6]
    needs = dict(zip(("q", "k", "v", *packed.names), (*of_inputs, *of_tensors), strict=True))
    needed = [needs.get(name, False) for name in names]
    made = capture_gradients(ctx.kernel, needed, dout, dlse, q, k, v, out, lse, packed)
    found = dict(zip(compress(names, needed), made, strict=True))
    tensors = [to_declared(found.get(name), x) for name, x in zip(packed.names, tensors, strict=True)]
    # torch takes a list of nothing for one of tensors.
    numbers: list[Any] = [None if values else [] for values in (packed.flags, packed.integers, packed.reals)]
    return *map(found.get, ("q", "k", "v")), None, None, None, tensors, *numbers


def _refuse_gradients(ctx: Any, dout: torch.Tensor) -> NoReturn:
    """Say that a graph has no gradients: torch's own word for it would be zeros."""
    must = "one that does not: nothing required grad where torch captured this call"
    raise ArgumentError("q", "a tensor that requires grad", must, "capture it again with what is trained")


def _refuse_second_derivatives(ctx: Any, *gradients: torch.Tensor) -> NoReturn:
    refuse_second_derivatives()


for name, made, fake in (
    ("attention", attention, fake_attention),
    ("attention_with_lse", attention_with_lse, fake_attention_with_lse),
    ("attention_backward", attention_backward, fake_attention_backward),
):
    for backend in ("CPU", "CUDA"):
        LIBRARY.impl(name, made, backend)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"attngen::{name}", fake, lib=LIBRARY)
for name, backward, keep in (
    ("attention", _refuse_gradients, None),
    ("attention_with_lse", _differentiate, _keep),
    ("attention_backward", _refuse_second_derivatives, None),
):
    torch.library.register_autograd(f"attngen::{name}", backward, setup_context=keep, lib=LIBRARY)
