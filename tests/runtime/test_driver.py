"""The driver's calls, with a stand-in for the bindings: what is called, in which order, and what an error says."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import attngen
from attngen.runtime import driver

bindings = pytest.importorskip("cuda.bindings.driver")
RESULTS = bindings.CUresult
EARLY = bindings.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class Bindings:
    """Stands for `cuda.bindings.driver`: records calls, answers what the test says; types are real."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.answers: dict[str, Callable[..., tuple[Any, ...]]] = {
            "cuGetErrorString": lambda code: (RESULTS.CUDA_SUCCESS, b"words of the driver")
        }
        monkeypatch.setattr(driver, "_driver", lambda: self)
        driver._primary_context.cache_clear()

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu") or isinstance(getattr(bindings, name), type):
            return getattr(bindings, name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            return self.answers.get(name, lambda *_: (RESULTS.CUDA_SUCCESS, None))(*arguments)

        return call

    def names(self) -> list[str]:
        """What was called, in order."""
        return [call[0] for call in self.calls]


@pytest.fixture(autouse=True)
def forget_the_stand_in() -> Iterator[None]:
    """No context of a stand-in outlives its test."""
    yield
    driver._primary_context.cache_clear()


@pytest.mark.parametrize(
    ("code", "cure"),
    [
        (RESULTS.CUDA_ERROR_INVALID_VALUE, "explain_launch"),
        (RESULTS.CUDA_ERROR_INVALID_CONTEXT, "spawn"),
        (RESULTS.CUDA_ERROR_OUT_OF_MEMORY, "empty_cache"),
        (RESULTS.CUDA_ERROR_NO_BINARY_FOR_GPU, "--arch"),
        (RESULTS.CUDA_ERROR_UNKNOWN, "nvidia-smi"),
    ],
)
def test_an_error_of_the_driver_comes_with_words_and_a_cure(
    monkeypatch: pytest.MonkeyPatch, code: Any, cure: str
) -> None:
    """Never a bare code: what attngen was doing, the driver's own words and what to do about it."""
    Bindings(monkeypatch).answers["cuLibraryLoadData"] = lambda *_: (code, None)
    with pytest.raises(attngen.ToolchainError) as caught:
        driver.Module(b"cubin")
    assert str(caught.value).startswith(f"loading the kernel: {code.name} (words of the driver)")
    assert cure in caught.value.cure


CAPTURE_MODE = "a capture's mode"
MEMORY_CALLS = ["cuMemAlloc", "cuStreamCreate", "cuMemsetD32Async", "cuStreamSynchronize", "cuStreamDestroy"]


def answers_of_a_gpu(stand_in: Bindings) -> None:
    """Device 3 has a context, and memory at 4096; the thread captures a graph."""
    ok = RESULTS.CUDA_SUCCESS
    stand_in.answers |= {
        "cuDeviceGet": lambda device: (ok, f"device {device}"),
        "cuDevicePrimaryCtxRetain": lambda handle: (ok, f"context of {handle}"),
        "cuThreadExchangeStreamCaptureMode": lambda mode: (ok, CAPTURE_MODE),
        "cuMemAlloc": lambda size: (ok, 4096),
        "cuStreamCreate": lambda flags: (ok, "stream"),
    }


def test_zeroed_memory_is_made_outside_of_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the device's context, in a mode that captures allow, with zeros that have arrived; then all is as before."""
    stand_in = Bindings(monkeypatch)
    answers_of_a_gpu(stand_in)
    assert driver.zeroed_memory(3, 64) == 4096
    (push,) = (call for call in stand_in.calls if call[0] == "cuCtxPushCurrent")
    assert push[1] == "context of device 3"
    start = stand_in.calls.index(push)
    assert stand_in.names()[start + 1 :] == [
        "cuThreadExchangeStreamCaptureMode",
        *MEMORY_CALLS,
        "cuThreadExchangeStreamCaptureMode",
        "cuCtxPopCurrent",
    ]
    modes = [call[1] for call in stand_in.calls if call[0] == "cuThreadExchangeStreamCaptureMode"]
    assert modes == [bindings.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED, CAPTURE_MODE]
    assert ("cuMemsetD32Async", 4096, 0, 64, "stream") in stand_in.calls
    driver.zeroed_memory(3, 64)
    assert stand_in.names().count("cuDevicePrimaryCtxRetain") == 1


def test_a_failed_preparation_leaves_the_thread_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory: the capture's mode and the context that was current come back."""
    stand_in = Bindings(monkeypatch)
    answers_of_a_gpu(stand_in)
    stand_in.answers["cuMemAlloc"] = lambda size: (RESULTS.CUDA_ERROR_OUT_OF_MEMORY, None)
    with pytest.raises(attngen.ToolchainError, match="allocating 256 bytes"):
        driver.zeroed_memory(3, 64)
    assert stand_in.calls[-2:] == [("cuThreadExchangeStreamCaptureMode", CAPTURE_MODE), ("cuCtxPopCurrent",)]


def test_a_kernel_is_prepared_once_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets its shared memory there and is loaded before any launch, so that a captured launch loads nothing."""
    stand_in = Bindings(monkeypatch)
    answers_of_a_gpu(stand_in)
    stand_in.answers["cuLibraryGetKernel"] = lambda library, name: (RESULTS.CUDA_SUCCESS, 64)
    stand_in.answers["cuKernelGetFunction"] = lambda kernel: (RESULTS.CUDA_SUCCESS, f"function of {kernel}")
    function = driver.Module(b"cubin").function("kernel", 1024)
    for device in (3, 3, 4):
        function.prepare(device)
    asked = [call for call in stand_in.calls if call[0] == "cuKernelSetAttribute"]
    assert [call[2:] for call in asked] == [(1024, 64, "device 3"), (1024, 64, "device 4")]
    assert stand_in.calls.count(("cuFuncLoad", "function of 64")) == 2


def numbers(config: Any) -> tuple[int, ...]:
    """What a launch is told: grid, threads, bytes of shared memory, stream."""
    grid = (config.gridDimX, config.gridDimY, config.gridDimZ)
    threads = (config.blockDimX, config.blockDimY, config.blockDimZ)
    return (*grid, *threads, config.sharedMemBytes, int(config.hStream))


def test_a_thread_without_a_context_gets_the_device_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """On that error alone the context is made current and the launch tried once more, with the same arguments."""
    stand_in = Bindings(monkeypatch)
    answers_of_a_gpu(stand_in)
    stand_in.answers["cuLibraryGetKernel"] = lambda library, name: (RESULTS.CUDA_SUCCESS, 64)
    function = driver.Module(b"cubin").function("kernel", 1024)

    def launch(*codes: Any) -> list[tuple[Any, ...]]:
        left, before = list(codes), len(stand_in.calls)
        stand_in.answers["cuLaunchKernelEx"] = lambda *_: (left.pop(0),)
        driver.launch(function, 5, 128, 1024, 3, 7, 0x1000)
        assert not left
        return [
            (call[0], numbers(call[1]), *call[2:]) if call[0] == "cuLaunchKernelEx" else call
            for call in stand_in.calls[before:]
            if call[0] in ("cuLaunchKernelEx", "cuCtxSetCurrent")
        ]

    ok, none = RESULTS.CUDA_SUCCESS, RESULTS.CUDA_ERROR_INVALID_CONTEXT
    started = ("cuLaunchKernelEx", (5, 1, 1, 128, 1, 1, 1024, 7), function.launchable, 0x1000, 0)
    assert launch(ok) == [started]
    assert launch(none, ok) == [started, ("cuCtxSetCurrent", "context of device 3"), started]
    with pytest.raises(attngen.ToolchainError, match="launching the kernel: CUDA_ERROR_INVALID_CONTEXT"):
        launch(none, none)
    with pytest.raises(attngen.ToolchainError, match="launching the kernel: CUDA_ERROR_INVALID_VALUE"):
        launch(RESULTS.CUDA_ERROR_INVALID_VALUE)


def test_only_a_kernel_that_waits_itself_starts_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """It alone is launched with the attribute; a launch is described once, and anew where anything of it differs."""
    stand_in = Bindings(monkeypatch)
    answers_of_a_gpu(stand_in)
    stand_in.answers["cuLibraryGetKernel"] = lambda library, name: (RESULTS.CUDA_SUCCESS, 64)
    monkeypatch.setattr(driver, "MOST_CONFIGS", 2)
    module = driver.Module(b"cubin")
    for starts_early in (False, True):
        function = module.function("kernel", 0, starts_early)
        for grid, stream in ((5, 7), (5, 7), (5, 8), (6, 7)):
            driver.launch(function, grid, 128, 0, 3, stream, 0x1000)
        configs = [call[1] for call in stand_in.calls if call[0] == "cuLaunchKernelEx"][-4:]
        assert configs[0] is configs[1]
        assert [numbers(config)[0::7] for config in configs] == [(5, 7), (5, 7), (5, 8), (6, 7)]
        assert len(function.configs) <= driver.MOST_CONFIGS
        for config in configs:
            attributes = config.attrs[: config.numAttrs]
            found = [(x.id, x.value.programmaticStreamSerializationAllowed) for x in attributes]
            assert found == [(EARLY, 1)] * starts_early
