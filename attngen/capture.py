"""A call as one operator, which torch's tracers and modes see: what it is packed into, and what it is unpacked from.

`attngen.op` defines the operators, and torch's own table of operators stands between: nothing here runs a kernel.
torch.compile traces `pack` and `capture`, which look at types alone and never at a number.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, wraps
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch

from attngen.bind import python_number
from attngen.errors import ArgumentError
from attngen.torch_state import autocast_dtype, constant, is_recorded

F = TypeVar("F", bound=Callable[..., Any])
SCALE = "softmax_scale"
_INTEGERS = (int, torch.SymInt)
_REALS = (float, torch.SymFloat)
_NUMBERS = (bool, *_INTEGERS, *_REALS)


class Packed(NamedTuple):
    """What a call passes besides q, k and v, as the schema of an operator has it.

    Attributes:
        form: the layout, the intake, and the names of the values in each of the lists, in order.
        softmax_scale: a number, or None.
        tensors: what is passed by name; numbers that a graph must not fix, too, as tensors without dimensions.
        flags: scalars that are bool.
        integers: scalars that are i32.
        reals: scalars that are f32.
    """

    form: str
    softmax_scale: float | None
    tensors: Sequence[torch.Tensor]
    flags: Sequence[bool]
    integers: Sequence[int]
    reals: Sequence[float]

    @property
    def names(self) -> tuple[str, ...]:
        """Those of the tensors, in order."""
        return _names_in(self.form.split(";")[2])


class Unpacked(NamedTuple):
    """What a call passes besides q, k and v, as a kernel takes it; `named` has no softmax_scale."""

    layout: str
    intake: str | None
    softmax_scale: Any
    named: dict[str, Any]


def pack(softmax_scale: Any, layout: str, intake: str | None, named: Mapping[str, Any]) -> Packed:
    """Put what a call passes into the lists of an operator; the same call gives the same form.

    Args:
        softmax_scale: as of `Kernel.__call__`.
        layout: see softmax_scale.
        intake: in which way the call begins, where q does not tell.
        named: what is passed by name; None is left out.

    Raises:
        ArgumentError: a value is neither a tensor nor a number of Python.
    """
    scale = _taken(SCALE, softmax_scale)
    tensors, flags, integers, reals = {}, {}, {}, {}
    for name in sorted(named):
        value = _taken(name, named[name])
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif isinstance(value, bool):
            flags[name] = value
        elif isinstance(value, _INTEGERS):
            integers[name] = value
        elif value is not None:
            reals[name] = value
    if isinstance(scale, torch.Tensor):
        tensors[SCALE], scale = scale, None
    groups = (tensors, flags, integers, reals)
    form = ";".join([layout, intake or "", *[",".join(group) for group in groups]])
    return Packed(form, scale, *[list(group.values()) for group in groups])


def unpack(packed: Packed) -> Unpacked:
    """What was packed; a scalar is of the kind that it was."""
    layout, intake, groups = _read(packed.form)
    named: dict[str, Any] = {}
    for names, values in zip(groups, packed[2:], strict=True):
        named.update(zip(names, values, strict=True))
    scale = named.pop(SCALE, packed.softmax_scale)
    return Unpacked(layout, intake or None, scale, named)


@lru_cache(maxsize=1024)
def _read(form: str) -> tuple[str, str, tuple[tuple[str, ...], ...]]:
    layout, intake, *groups = form.split(";")
    return layout, intake, tuple(map(_names_in, groups))


def _names_in(group: str) -> tuple[str, ...]:
    return tuple(group.split(",")) if group else ()


def _taken(name: str, value: Any) -> Any:
    """A value of a call: a tensor, a number of Python, or None.

    A real number that varies from call to call is a tensor under torch.compile, whose graphs would fix it.
    """
    is_compiling = torch.compiler.is_dynamo_compiling()
    if not (is_compiling or isinstance(value, torch.Tensor)):
        value = python_number(name, value)
    if not (value is None or isinstance(value, (torch.Tensor, *_NUMBERS))):
        refuse(
            name, type(value).__name__, "a tensor or a number of Python", f"pass {name}.item() of a number"
        )
    if not (is_compiling and isinstance(value, _REALS)):
        return value
    from torch.fx.experimental.symbolic_shapes import has_static_value  # which takes half a second to load

    if has_static_value(value):
        return value
    return torch.zeros((), dtype=torch.float64, device="cpu") + value  # type: ignore[operator]


def fixed_size(size: int) -> int:
    """A size that the kernel is made for: where torch's tracers have it as one that varies, they fix it."""
    from torch.fx.experimental.symbolic_shapes import guard_scalar

    return int(guard_scalar(size))


@constant
def refuse(argument: str, got: str, must: str, cure: str) -> NoReturn:
    """Say what is wrong with an argument; torch.compile ends with that too, where errors of others break its graph.

    Raises:
        ArgumentError: always.
    """
    raise ArgumentError(argument, got, must, cure)


def capture(
    text: str,
    gradients: tuple[str, ...],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    return_lse: bool,
    packed: Packed,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """A call as an operator, with the gradients that autograd wants of it.

    Args:
        text: of the kernel (`Kernel.text`).
        gradients: of what it has them, by name.
        q: as of `Kernel.__call__`, like k, v and return_lse.
        k: see q.
        v: see q.
        return_lse: see q.
        packed: everything else.

    Raises:
        ArgumentError: a gradient is wanted that the kernel does not make.
    """
    is_differentiated = check_gradients(gradients, q, k, v, packed)
    if return_lse or is_differentiated:
        out, lse = torch.ops.attngen.attention_with_lse.default(q, k, v, text, *packed)
        return (out, lse) if return_lse else out
    made: torch.Tensor = torch.ops.attngen.attention.default(q, k, v, text, *packed)
    return made


def check_gradients(
    gradients: tuple[str, ...], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed
) -> bool:
    """Whether a gradient is wanted of something that a call passes; arguments are those of `capture`.

    Raises:
        ArgumentError: one is wanted that the kernel does not make.
    """
    named = zip(("q", "k", "v", *packed.names), (q, k, v, *packed.tensors), strict=True)
    wanted = [name for name, x in named if is_recorded(x)]
    for name in wanted:
        if name not in gradients:
            must = f"one that does not: this kernel makes no gradient of {name}"
            cure = f"say it in the spec's gradients, pass {name}.detach(), or call under torch.no_grad()"
            refuse(name, "a tensor that requires grad", must, cure)
    return bool(wanted)


def capture_gradients(
    text: str,
    needed: Sequence[bool],
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    packed: Packed,
) -> Sequence[torch.Tensor]:
    """The backward pass of a call as an operator: the gradients that are needed of `Kernel.gradients`, in order."""
    given = (dout, dlse, out, lse, needed, q, k, v, text, *packed)
    made: Sequence[torch.Tensor] = torch.ops.attngen.attention_backward.default(*given)
    return made


class CapturedKernel:
    """A kernel as torch.compile has it while it traces `attention`: called as an `attngen.Kernel`.

    Args:
        text: of the kernel.
        gradients: of what it has them, by name.
        dtype: of its inputs.
    """

    def __init__(self, text: str, gradients: tuple[str, ...], dtype: torch.dtype) -> None:
        self.text = text
        self.gradients = gradients
        self.dtype = dtype

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        softmax_scale: float | None = None,
        return_lse: bool = False,
        out: torch.Tensor | None = None,
        layout: str = "bshd",
        tables: object = None,
        work: object = None,
        **declared: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Capture a call; arguments are those of `attngen.Kernel.__call__`."""
        check_captured(out=out, tables=tables, work=work)
        q, k, v = (cast(x, (self.dtype,)) for x in (q, k, v))
        packed = pack(softmax_scale, layout, None, declared)
        return capture(self.text, self.gradients, q, k, v, return_lse, packed)


def not_captured(function: F) -> F:
    """Have a function refuse to be traced, whatever it is that torch's tracers would make of it."""

    @wraps(function)
    def refusing(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            name = function.__name__
            refuse(name, "a call", "none inside of what torch compiles or exports", f"call {name} before")
        return function(*args, **kwargs)

    return refusing  # type: ignore[return-value]


def check_captured(**memory: object) -> None:
    """Refuse what an operator that gives new tensors has no place for.

    Args:
        **memory: arguments that are memory of the caller's.

    Raises:
        ArgumentError: one of these is not None; or torch.compile meets a transform of torch.func inside.
    """
    for name, value in memory.items():
        if value is not None:
            must = "None: what is captured or transformed of a call makes its own"
            refuse(name, "memory of the caller's", must, "pass none, or call outside")
    if torch.compiler.is_dynamo_compiling() and torch._C._are_functorch_transforms_active():
        must = "one outside of transforms: torch.compile does not tell what they do with it"
        refuse("q", "a tensor inside torch.func, inside torch.compile", must, "transform without compiling")


def cast(x: Any, taken: Sequence[torch.dtype]) -> Any:
    """A tensor in the type of the autocast context, unless a kernel takes the one that it has; else what it is."""
    return x if not isinstance(x, torch.Tensor) or x.dtype in taken else x.to(autocast_dtype(x))
