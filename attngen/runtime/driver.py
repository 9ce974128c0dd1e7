"""The CUDA driver: loading a cubin and launching its kernels. The one module that calls it."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from attngen.arch import ARCHS
from attngen.errors import ToolchainError

TENSOR_MAP_BYTES = 128
MOST_CONFIGS = 4096
"""Launch configurations that a kernel remembers; a program with more starts over."""
_MAX_DYNAMIC_SMEM = "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"


@cache
def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise ToolchainError(
            f"the CUDA bindings cannot be loaded: {error}", "pip install 'cuda-python>=13.0.3,<14'"
        ) from error
    return driver


def _check(result: tuple[Any, ...], what: str) -> Any:
    code, *values = result
    if int(code) != 0:
        driver = _driver()
        text = driver.cuGetErrorString(code)[1]
        meaning = text.decode() if isinstance(text, bytes) else "no description"
        raise ToolchainError(f"{what}: {code.name} ({meaning})", _cure(code.name))
    return values[0] if values else None


def _cure(code: str) -> str:
    if code in ("CUDA_ERROR_INVALID_IMAGE", "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"):
        return "the driver is older than this cubin: install a driver for CUDA 13 (580 or later)"
    if code == "CUDA_ERROR_NO_BINARY_FOR_GPU":
        return "build for this GPU's target: attngen build --arch"
    if code in ("CUDA_ERROR_ILLEGAL_ADDRESS", "CUDA_ERROR_LAUNCH_FAILED"):
        return "an earlier kernel of this process failed; run under compute-sanitizer to find which"
    if code == "CUDA_ERROR_INVALID_VALUE":
        return "this GPU or its driver takes no such number: see explain_launch for what was asked, update the driver"
    if code == "CUDA_ERROR_INVALID_CONTEXT":
        return "the GPU's context is gone, as after a reset or in a forked child: start a process anew, with spawn"
    if code == "CUDA_ERROR_OUT_OF_MEMORY":
        return "free memory of the GPU; what torch only keeps in reserve, torch.cuda.empty_cache() gives back"
    return "check that the GPU is free and its driver works (nvidia-smi)"


@cache
def _primary_context(device: int) -> Any:
    """The context of a device that torch uses too; held until the process ends."""
    driver = _driver()
    handle = _check(driver.cuDeviceGet(device), "finding the device")
    return _check(driver.cuDevicePrimaryCtxRetain(handle), "taking the device's context")


@contextmanager
def preparing(device: int) -> Iterator[None]:
    """Let this thread load kernels and allocate on a device, whatever its current one and whatever is being captured.

    While a graph is captured the driver refuses what might synchronise, unless the thread says that it knows better;
    none of what runs here becomes part of a graph.
    """
    driver = _driver()
    exchange = driver.cuThreadExchangeStreamCaptureMode
    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    _check(driver.cuCtxPushCurrent(_primary_context(device)), "entering the device's context")
    try:
        mode = _check(exchange(relaxed), "stepping outside of captures")
        try:
            yield
        finally:
            _check(exchange(mode), "stepping back into captures")
    finally:
        _check(driver.cuCtxPopCurrent(), "leaving the device's context")


def zeroed_memory(device: int, words: int) -> int:
    """The address of as many 32-bit zeros on a device, there for every stream; never freed.

    It does not come from torch, whose allocator would count it to the pool of a graph that is being captured.
    """
    driver = _driver()
    with preparing(device):
        address = _check(driver.cuMemAlloc(4 * words), f"allocating {4 * words} bytes")
        flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value
        stream = _check(driver.cuStreamCreate(flags), "making a stream")
        _check(driver.cuMemsetD32Async(address, 0, words, stream), "writing zeros")
        _check(driver.cuStreamSynchronize(stream), "writing zeros")
        _check(driver.cuStreamDestroy(stream), "giving a stream back")
    return int(address)


class Function:
    """A kernel of a loaded cubin, ready on any device whose context is current."""

    def __init__(self, module: "Module", handle: Any, smem_bytes: int, starts_early: bool) -> None:
        self._module = module  # keeps the library loaded
        self.handle = handle
        self.launchable = _driver().CUfunction(int(handle))  # the launch takes either kind of handle
        self.start = _driver().cuLaunchKernelEx
        self.configs: dict[tuple[int, int, int, int], Any] = {}
        self._smem_bytes = smem_bytes
        self._starts_early = starts_early
        self._prepared: set[int] = set()

    def prepare(self, device: int) -> None:
        """Load the kernel on a device whose context is current and allow it its shared memory; once is enough.

        Left to itself the driver loads at the first launch, which may have to wait for whatever runs.
        """
        if device in self._prepared:
            return
        driver = _driver()
        attribute = getattr(driver.CUfunction_attribute, _MAX_DYNAMIC_SMEM)
        handle = _check(driver.cuDeviceGet(device), "finding the device")
        _check(
            driver.cuKernelSetAttribute(attribute, self._smem_bytes, self.handle, handle),
            f"asking for {self._smem_bytes} bytes of shared memory",
        )
        loaded = _check(driver.cuKernelGetFunction(self.handle), "finding the kernel on the device")
        _check(driver.cuFuncLoad(loaded), "loading the kernel on the device")
        self._prepared.add(device)

    def config(self, grid: int, threads: int, smem_bytes: int, stream: int) -> Any:
        """What the driver is told of a launch; to fill it takes longer than to launch, so it is kept in `configs`."""
        driver = _driver()
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes, config.hStream = smem_bytes, stream
        if self._starts_early:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        if len(self.configs) >= MOST_CONFIGS:
            self.configs.clear()
        self.configs[grid, threads, smem_bytes, stream] = config
        return config


class Module:
    """A loaded cubin."""

    def __init__(self, cubin: bytes) -> None:
        driver = _driver()
        _check(driver.cuInit(0), "starting the CUDA driver")
        self._cubin = cubin
        self._library = _check(driver.cuLibraryLoadData(cubin, [], [], 0, [], [], 0), "loading the kernel")

    def function(self, name: str, smem_bytes: int, starts_early: bool = False) -> Function:
        """A kernel.

        Args:
            name: what the cubin calls it.
            smem_bytes: of dynamic shared memory, which it will ask for.
            starts_early: it waits itself for what came before it in the stream, so it may be launched ahead of its end.
        """
        driver = _driver()
        kernel = _check(driver.cuLibraryGetKernel(self._library, name.encode()), f"finding kernel {name}")
        return Function(self, kernel, smem_bytes, starts_early)


def encode_tensor_map(
    address: int,
    dims: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    element_bytes: int,
) -> bytes:
    """A descriptor with a 128-byte swizzle; out of bounds reads as zeros.

    Args:
        address: of the first element, a multiple of 16.
        dims: extents, fastest first.
        strides: of all dimensions but the first, in bytes.
        box: extents of one copy.
        element_bytes: 1 or 2.

    Raises:
        ToolchainError: the driver refused.
    """
    driver = _driver()
    types = driver.CUtensorMapDataType
    u64, u32 = driver.cuuint64_t, driver.cuuint32_t
    encoded = driver.cuTensorMapEncodeTiled(
        {1: types.CU_TENSOR_MAP_DATA_TYPE_UINT8, 2: types.CU_TENSOR_MAP_DATA_TYPE_UINT16}[element_bytes],
        len(dims),
        address,
        [u64(extent) for extent in dims],
        [u64(stride) for stride in strides],
        [u32(extent) for extent in box],
        [u32(1)] * len(dims),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    made = _check(
        encoded, f"describing a tensor of {dims} with strides of {strides} bytes to the copy engine"
    )
    return ctypes.string_at(made.getPtr(), TENSOR_MAP_BYTES)


def launch(
    function: Function, grid: int, threads: int, smem_bytes: int, device: int, stream: int, arguments: int
) -> None:
    """Start a kernel; `arguments` is the address of the array of pointers to its parameters.

    Raises:
        ToolchainError: the driver refused.
    """
    config = function.configs.get((grid, threads, smem_bytes, stream))
    if config is None:
        config = function.config(grid, threads, smem_bytes, stream)
    result = function.start(config, function.launchable, arguments, 0)
    if result[0]:
        _launch_again(result, function, device, config, arguments)


def _launch_again(
    result: tuple[Any, ...], function: Function, device: int, config: Any, arguments: int
) -> None:
    """Mend what can be mended of a launch that failed: a thread that has not used the GPU before has no context."""
    driver = _driver()
    if result[0] == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:
        _check(driver.cuCtxSetCurrent(_primary_context(device)), "entering the device's context")
        result = function.start(config, function.launchable, arguments, 0)
    _check(result, "launching the kernel")


def check_device(arch: str, capability: tuple[int, int]) -> None:
    """Refuse to run a cubin on a GPU that cannot load it.

    Raises:
        ToolchainError: names both.
    """
    if not ARCHS[arch].runs_on(capability):
        raise ToolchainError(
            f"a kernel for {arch} does not run on a GPU of compute capability {capability[0]}.{capability[1]}",
            "compile for this GPU (arch=None picks it), or move the tensors to one that fits",
        )
