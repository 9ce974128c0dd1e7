"""States of torch under which a call must give what it gives elsewhere: what a process may have set, by name."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")


@contextmanager
def _setting(change: Callable[[T], object], read: Callable[[], T], value: T) -> Iterator[None]:
    """Something of the process, changed and changed back."""
    before = read()
    change(value)
    try:
        yield
    finally:
        change(before)


@contextmanager
def _autocast(dtype: torch.dtype) -> Iterator[None]:
    with ExitStack() as stack:
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            stack.enter_context(torch.autocast(device, dtype=dtype))
        yield


@contextmanager
def _inside_of_vmap() -> Iterator[None]:
    """What a function sees that torch.vmap calls, of tensors that it was not given."""
    functorch = torch._C._functorch
    functorch._vmap_increment_nesting(2, "error")
    try:
        yield
    finally:
        functorch._vmap_decrement_nesting()


class _FunctionMode(TorchFunctionMode):
    """Looks on, a function at a time."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class _DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks on, an operator at a time."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


_dtype = partial(_setting, torch.set_default_dtype, torch.get_default_dtype)
_matmuls = partial(_setting, torch.set_float32_matmul_precision, torch.get_float32_matmul_precision)
_are_deterministic = torch.are_deterministic_algorithms_enabled
_warn_if_not = partial(torch.use_deterministic_algorithms, warn_only=True)

PLAIN = "as imported"
STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    PLAIN: nullcontext,
    "default dtype bfloat16": partial(_dtype, torch.bfloat16),
    "default dtype float16": partial(_dtype, torch.float16),
    "default dtype float64": partial(_dtype, torch.float64),
    "default device meta": partial(torch.device, "meta"),
    "autocast bfloat16": partial(_autocast, torch.bfloat16),
    "autocast float16": partial(_autocast, torch.float16),
    "deterministic": partial(_setting, torch.use_deterministic_algorithms, _are_deterministic, True),
    "deterministic or a warning": partial(_setting, _warn_if_not, _are_deterministic, True),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "forward-mode AD": forward_ad.dual_level,
    "inside of vmap": _inside_of_vmap,
    "function mode": _FunctionMode,
    "dispatch mode": _DispatchMode,
    "matmul precision high": partial(_matmuls, "high"),
    "matmul precision medium": partial(_matmuls, "medium"),
    "subnormals flushed": partial(_setting, torch.set_flush_denormal, lambda: False, True),
    "threads": partial(_setting, torch.set_num_threads, torch.get_num_threads, 3),
}
"""What sets each up, and takes it back."""
