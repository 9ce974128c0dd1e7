"""Torch's own state, set aside while a result is computed: autocast, default devices, modes, transforms and the like.

What a thread may set is set aside by `torch_defaults`, and so are the precision of matrix products and the demand for
deterministic algorithms, which are the process's. The default dtype is the process's too, but another thread may be
making a model under it: nothing here touches it, and no tensor of attngen leaves its format to it
(tests/test_architecture.py). Thread counts are let alone here; `attngen.simulate.one_thread` is for the simulator.
"""

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable[..., object])

_innermost_transform = torch._C._functorch.peek_interpreter_stack
_count_modes = torch._C._len_torch_dispatch_stack
_is_forward_enabled = torch._C._is_fwd_grad_enabled
_current_modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_TRACING_MODES = tuple(torch._C._TorchDispatchModeKey.__members__.values())
"""Modes of torch's own, under which new tensors are fake or stand for others; modes that users write may look on."""
_RECORDING = torch._C._TorchDispatchModeKey.PROXY
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_ABSTRACT = (FakeTensor, FunctionalTensor)
_CASTABLE = (torch.float32, torch.float16, torch.bfloat16)


def is_altered() -> bool:
    """Whether tensors may not be what they seem: under torch.func's transforms, forward-mode AD or while torch traces.

    Never within `torch_defaults`. Takes a tenth of a microsecond, which every launch can afford.
    """
    return (
        _innermost_transform() is not None
        or (forward_ad._current_level >= 0 and _is_forward_enabled())
        or (_count_modes() > 0 and any(torch._C._get_dispatch_mode(key) for key in _TRACING_MODES))
    )


def constant(function: F) -> F:
    """Have torch.compile call a function of constants while it traces, and take what it returns for a constant.

    `torch.compiler.assume_constant_result` sets the same attribute, and loads the compiler for it, which takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def may_be_watched(x: object) -> bool:
    """Whether modes, transforms or a class of tensors may want to see the operators of a call; a quick look at all."""
    is_usual = x.__class__ in _PLAIN or not isinstance(x, torch.Tensor)
    return not is_usual or _count_modes() > 0 or _innermost_transform() is not None


def is_transformed(x: object) -> bool:
    """Whether torch.func's grad, vjp, jvp or vmap has put this in the place of another tensor."""
    if _innermost_transform() is None or not isinstance(x, torch.Tensor):
        return False
    return _is_wrapped(x) and not torch._is_functional_tensor(x)


def are_transformed(values: Iterable[object]) -> bool:
    """Whether that is so of one of these; to torch.compile, which does not tell, it is so under each transform."""
    is_transforming: bool = torch._C._are_functorch_transforms_active()  # which torch.compile knows
    return is_transforming and (torch.compiler.is_dynamo_compiling() or any(map(is_transformed, values)))


def is_traced(x: object) -> bool:
    """Whether what is done to this is written down: by torch.compile, or by a tracer whose tensors have sizes and no
    numbers. What torch says of the process (`torch.compiler.is_compiling`) is so of other threads too.
    """
    return torch.compiler.is_dynamo_compiling() or isinstance(x, _ABSTRACT)


def are_traced(values: Iterable[object]) -> bool:
    """Whether that is so of all tensors among these, of which there is one at least."""
    tensors = [x for x in values if isinstance(x, torch.Tensor)]
    return torch.compiler.is_dynamo_compiling() or (bool(tensors) and all(map(is_traced, tensors)))


def is_recorded(x: object) -> bool:
    """Whether autograd, or a transform of torch.func, records what is done to this."""
    if not isinstance(x, torch.Tensor) or not torch.is_grad_enabled():
        return False
    while not x.requires_grad:
        if torch.compiler.is_dynamo_compiling() or not is_transformed(x):
            return False
        x = torch._C._functorch.get_unwrapped(x)
    return True


def is_watched() -> bool:
    """Whether a mode looks on that is to see an operator: one that a user wrote, or torch's own that records graphs."""
    keys = (getattr(mode, "_mode_key", None) for mode in _current_modes())
    return _count_modes() > 0 and any(key is None or key is _RECORDING for key in keys)


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The type that x has in the autocast context it is met in: the context's, of what torch's attention would cast."""
    device = x.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device) and x.dtype in _CASTABLE:
        return torch.get_autocast_dtype(device)
    return x.dtype


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Have torch work in this thread as it does where nobody has set anything; also a decorator of functions.

    New tensors are on the CPU unless they say where, nothing is recorded for gradients or watched by modes, products of
    f32 are products of f32, and subnormal numbers are numbers.
    """
    with ExitStack() as stack:
        if _innermost_transform() is not None:
            stack.enter_context(temporarily_clear_interpreter_stack())
        for mode in filter(
            None, map(torch._C._unset_dispatch_mode, _TRACING_MODES if _count_modes() else ())
        ):
            stack.callback(torch._C._set_dispatch_mode, mode)
        stack.enter_context(torch._C.DisableTorchFunction())  # a default device is a mode of functions
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(forward_ad._set_fwd_grad_enabled(False))
        stack.enter_context(subnormal_numbers())
        stack.enter_context(_PROCESS)
        yield


@contextmanager
def subnormal_numbers() -> Iterator[None]:
    """Have this thread compute with subnormal numbers, Python's own arithmetic and conversions too."""
    flushes = sys.float_info.min / 2 == 0.0  # torch does not tell
    if flushes:
        torch.set_flush_denormal(False)
    try:
        yield
    finally:
        if flushes:
            torch.set_flush_denormal(True)


class _Process:
    """What all threads share: the first to enter sets it; the last to leave sets back what nobody has set meanwhile."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._set_back: list[Callable[[], None]] = []

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._set_back = [*_make_matmuls_exact(), *_allow_all_algorithms()]
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                for set_back in self._set_back:
                    set_back()


_PROCESS = _Process()


def _make_matmuls_exact() -> Iterator[Callable[[], None]]:
    """Multiply f32 as f32, and yield what undoes that. Newer versions of torch have a setting for each backend too."""
    backends = (torch.backends.cuda, torch.backends.mkldnn)
    settings = [each.matmul for each in backends if hasattr(getattr(each, "matmul", None), "fp32_precision")]
    of_backends = [each.fp32_precision for each in settings]
    try:
        of_all = torch.get_float32_matmul_precision()
    except RuntimeError:  # those of the backends say otherwise, and torch does not tell
        of_all = "highest"
    if of_all == "highest" and not {*of_backends} - {"none", "ieee"}:
        return
    torch.set_float32_matmul_precision("highest")  # of each backend too
    made_exact = [each.fp32_precision for each in settings]

    def set_back() -> None:
        if [each.fp32_precision for each in settings] != made_exact:
            return
        torch.set_float32_matmul_precision(of_all)
        for setting, precision in zip(settings, of_backends, strict=True):
            setting.fp32_precision = precision

    yield set_back


def _allow_all_algorithms() -> Iterator[Callable[[], None]]:
    """Take back a demand for deterministic algorithms, which fails where a reference multiplies on a GPU."""
    if torch.are_deterministic_algorithms_enabled():
        warns = torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(False)

        def set_back() -> None:
            if not torch.are_deterministic_algorithms_enabled():
                torch.use_deterministic_algorithms(True, warn_only=warns)

        yield set_back
