"""Torch's own state, set aside while a result is computed: autocast, default devices, modes, transforms and the like.

What a thread may set is set aside by `torch_defaults`, and so are the precision of matrix products and the demand for
deterministic algorithms, which are the process's. The default dtype is the process's too, but another thread may be
making a model under it: nothing here touches it, and no tensor of attngen leaves its format to it
(tests/test_architecture.py). Thread counts are let alone here; `attngen.simulate.one_thread` is for the simulator.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

_innermost_transform = torch._C._functorch.peek_interpreter_stack
_count_modes = torch._C._len_torch_dispatch_stack
_is_forward_enabled = torch._C._is_fwd_grad_enabled
_TRACING_MODES = tuple(torch._C._TorchDispatchModeKey.__members__.values())
"""Modes of torch's own, under which new tensors are fake or stand for others; modes that users write may look on."""


def is_altered() -> bool:
    """Whether tensors may not be what they seem: under torch.func's transforms, forward-mode AD or while torch traces.

    Never within `torch_defaults`. Takes a tenth of a microsecond, which every launch can afford.
    """
    return (
        _innermost_transform() is not None
        or (forward_ad._current_level >= 0 and _is_forward_enabled())
        or (_count_modes() > 0 and any(torch._C._get_dispatch_mode(key) for key in _TRACING_MODES))
    )


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
