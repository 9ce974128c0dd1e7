"""Lone kernels in the place of a GPU's: g++ compiles the emitted text, and a launcher starts it on CPU tensors."""

from collections.abc import Iterator
from functools import cache

import pytest
import torch

from attngen.serving.lone_kernel import LoneKernel, LoneLauncher
from tests.quantize.on_cpu import CpuKernels


@cache
def launcher_by_gpp(kernel: LoneKernel) -> LoneLauncher:
    """The launcher of a kernel that g++ has compiled."""
    code = CpuKernels(kernel.source)
    return LoneLauncher(kernel, load=code.load, start=code.start)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a launcher find that no device is current, as CPU tensors are on none."""
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    monkeypatch.setattr(LoneKernel, "compiled", lambda kernel: _NoCode())
    yield


class _NoCode:
    """Stands for what NVRTC gives."""

    cubin = b""
