"""The launcher, with a recorder in place of the driver: what a GPU would be handed."""

import ctypes
import struct
import weakref
from collections.abc import Iterator

import pytest
import torch

import attngen
from attngen.arch import ARCHS
from attngen.emit import emit_module
from attngen.lower import lower
from attngen.runtime import Launcher, LaunchReport, tensor_maps
from attngen.runtime import launch as launch_module
from attngen.runtime.loaded import LoadedKernels
from tests.plans import no_code

CAUSAL = {"problem": {"head_dim": 64}, "mask": "causal"}
KERNEL = attngen.compile(CAUSAL | {"schedule": {"kind": "fa2"}}, arch="sm_90a")
SPECIALISED = {
    persistent: attngen.compile(
        CAUSAL | {"schedule": {"kind": "warp_specialized", "persistent": persistent}}, arch="sm_90a"
    )
    for persistent in (True, False)
}
COUNTER_ADDRESS = 0xC0C0


class Recorder:
    """Stands for the driver: modules without code, launches kept as the bytes of their parameters."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        kernel: attngen.Kernel = KERNEL,
        struct_bytes: int = 8 * 17 + 4 * 6,
    ) -> None:
        self.kernel = kernel
        self.struct_bytes = struct_bytes
        self.structs: list[bytes] = []
        self.grids: list[int] = []
        self.early: dict[str, bool] = {}
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)

    def load(self, cubin: bytes) -> "Recorder":
        return self

    def function(self, name: str, smem_bytes: int, starts_early: bool) -> "Recorder":
        self.early[name] = starts_early
        return self

    def prepare(self, device: int, count: int = 1) -> None:
        pass

    def start(
        self,
        function: object,
        grid: int,
        threads: int,
        smem: int,
        device: int,
        stream: int,
        arguments: int,
    ) -> None:
        assert (threads, stream) == (self.kernel.plan.threads, 7)
        address = ctypes.c_void_p.from_address(arguments).value
        assert address is not None
        self.structs.append(ctypes.string_at(address, self.struct_bytes))
        self.grids.append(grid)


def fields(raw: bytes) -> dict[str, float]:
    values = struct.unpack("=5Q12q5if", raw)
    return dict(zip((param.name for param in KERNEL.plan.params), values, strict=True))


def test_the_struct_carries_what_the_manifest_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pointers, strides, sizes and scale stand where C puts them; lse is 0 unless asked for."""
    recorder = Recorder(monkeypatch)
    launcher = Launcher(KERNEL.manifest, no_code, load=recorder.load, start=recorder.start)
    q, k = torch.randn(2, 300, 4, 64).bfloat16(), torch.randn(2, 100, 2, 64).bfloat16()
    out, lse = launcher.run(q, k, k, softmax_scale=-0.5)
    sent = fields(recorder.structs[0])
    assert (sent["q"], sent["v"], sent["out"], sent["lse"]) == (q.data_ptr(), k.data_ptr(), out.data_ptr(), 0)
    assert (sent["q_stride_batch"], sent["k_stride_seqlen"], sent["out_stride_head"]) == (300 * 256, 128, 64)
    assert (sent["seqlen_q"], sent["seqlen_k"], sent["num_heads_q"], sent["group"]) == (300, 100, 4, 2)
    assert sent["scale_is_negative"] == 1
    assert sent["softmax_scale_log2"] == pytest.approx(0.5 * 1.4426950408889634)
    assert recorder.grids == [2 * 4 * 3] and lse is None


@pytest.mark.parametrize(("arch", "starts_early"), [("sm_80", False), ("sm_90a", True), ("sm_120", False)])
def test_kernels_that_wait_themselves_are_loaded_as_such(
    monkeypatch: pytest.MonkeyPatch, arch: str, starts_early: bool
) -> None:
    """Those of sm_90a, the one for tables too: their texts wait, and no others do."""
    spec = {"problem": {"head_dim": 64}, "mask": "document(doc)", "tensors": {"doc": "i32[batch, seqlen_k]"}}
    call = lower(attngen.load(spec), ARCHS[arch])
    names = [kernel.name for kernel in call.kernels]
    assert f"{call.attention.name}_tables" in names
    texts = "".join(map(emit_module, call.modules.values()))
    assert texts.count("  wait_for_earlier_kernels();") == len(names) * starts_early
    recorder = Recorder(monkeypatch)
    loaded = LoadedKernels(arch, call.manifest.kernels, no_code, recorder.load, recorder.start)
    for kernel in call.manifest.kernels:
        loaded.function(kernel, 0)
    assert recorder.early == dict.fromkeys(names, starts_early)


def test_fresh_tensors_of_a_known_signature_get_their_own_pointers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered of a signature never holds a pointer."""
    recorder = Recorder(monkeypatch)
    launcher = Launcher(KERNEL.manifest, no_code, load=recorder.load, start=recorder.start)
    for _ in range(3):
        q = torch.randn(1, 64, 2, 64).bfloat16()
        out, lse = launcher.run(q, q, q, return_lse=True)
        sent = fields(recorder.structs[-1])
        assert (sent["q"], sent["out"]) == (q.data_ptr(), out.data_ptr())
        assert lse is not None and sent["lse"] == lse.data_ptr() and lse.shape == (1, 2, 64)


def test_what_is_remembered_of_a_signature_keeps_no_tensor_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs of the first call go when their owner lets them go: a program meets thousands of signatures."""
    recorder = Recorder(monkeypatch)
    launcher = Launcher(KERNEL.manifest, no_code, load=recorder.load, start=recorder.start)
    q = torch.randn(1, 64, 2, 64).bfloat16()
    gone = weakref.ref(q)
    launcher.run(q, q, q)
    del q
    assert gone() is None and len(recorder.structs) == 1


def test_a_fresh_output_is_contiguous_whatever_q_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has q's order of dimensions and v's head_dim, and never q's strides, types and sizes where they are others."""
    recorder = Recorder(monkeypatch)
    launcher = Launcher(KERNEL.manifest, no_code, load=recorder.load, start=recorder.start)
    packed = torch.randn(2, 64, 3, 4, 64).bfloat16()
    plain = packed[:, :, 0].contiguous()
    for q in (plain, packed[:, :, 1], plain.transpose(1, 2).contiguous().transpose(1, 2), plain[:1, :1]):
        out, _ = launcher.run(q, q, q)
        sent = fields(recorder.structs[-1])
        assert out.shape == q.shape and out.dtype == torch.bfloat16 and out.is_contiguous()
        if q.shape == plain.shape:
            steps = (sent["out_stride_batch"], sent["out_stride_seqlen"], sent["out_stride_head"])
            assert (*steps, 1) == out.stride()
    wide = attngen.compile({"problem": {"head_dim": {"qk": 192, "v": 128}}, "mask": "causal"}, arch="sm_90a")
    other = SpecialisedRecorder(monkeypatch, True)
    launcher = Launcher(wide.manifest, no_code, load=other.load, start=lambda *arguments: None)
    q = torch.zeros(1, 64, 2, 192).bfloat16()
    assert launcher.run(q, q, q[..., :128].contiguous())[0].shape == (1, 64, 2, 128)


def test_a_misaligned_pointer_of_a_known_signature_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alignment is a matter of the call, not of the signature."""
    recorder = Recorder(monkeypatch)
    launcher = Launcher(KERNEL.manifest, no_code, load=recorder.load, start=recorder.start)
    storage = torch.randn(64 * 2 * 64 + 1).bfloat16()
    good, bad = storage[:-1].view(1, 64, 2, 64), storage[1:].view(1, 64, 2, 64)
    launcher.run(good, good, good)
    with pytest.raises(attngen.ArgumentError, match="argument q"):
        launcher.run(bad, good, good)
    assert len(recorder.grids) == 1


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *((name, value) for name in "qkv" for value in (None, 1.0, [[1.0]], "q")),
        *((name, torch.zeros(2, 8, 4, 64).bfloat16().to_sparse()) for name in "qkv"),
        *((name, value) for name in ("layout", "out") for value in (3, ["bshd"], "sbhd")),
        ("layout", None),
        *(("softmax_scale", value) for value in ([1.0], "1", True, torch.ones(2), 1j)),
    ],
)
def test_whatever_is_passed_in_its_place_an_argument_is_named(
    monkeypatch: pytest.MonkeyPatch, argument: str, value: object
) -> None:
    """None, a list, a number, a sparse tensor: an ArgumentError of that argument, known signature or not."""
    recorder = Recorder(monkeypatch)
    launcher = Launcher(KERNEL.manifest, no_code, load=recorder.load, start=recorder.start)
    q = torch.zeros(2, 8, 4, 64).bfloat16()
    good = {"q": q, "k": q, "v": q, "softmax_scale": 1.0, "layout": "bshd", "out": None}
    for call in (launcher.run, KERNEL):  # the GPU's path and the CPU's
        for _ in range(2):
            with pytest.raises(attngen.ArgumentError) as caught:
                call(**good | {argument: value})
            assert caught.value.argument == argument
            if call is not KERNEL:
                launcher.run(**good)
    assert len(recorder.grids) == 2


@pytest.mark.parametrize("argument", ["q", "k", "v"])
def test_attention_names_what_is_no_tensor(argument: str) -> None:
    """The call that picks its kernel by the tensors looks at them first."""
    good = dict.fromkeys(("q", "k", "v"), torch.zeros(1, 4, 1, 32).bfloat16())
    with pytest.raises(attngen.ArgumentError, match=f"argument {argument}: got NoneType"):
        attngen.attention(**good | {argument: None})


def test_the_serving_kernel_is_asked_for_with_a_length() -> None:
    """A K without keys to count is refused where the kernel for it is looked for."""
    for k, layout, argument in (
        (None, "bshd", "k"),
        (torch.zeros(2, 3), "bshd", "k"),
        (None, "dhsb", "layout"),
    ):
        with pytest.raises(attngen.ArgumentError, match=f"argument {argument}"):
            KERNEL.serving(k, layout)


def test_an_empty_output_launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No queries: no grid. No keys: the kernel must still write zeros."""
    recorder = Recorder(monkeypatch)
    launcher = Launcher(KERNEL.manifest, no_code, load=recorder.load, start=recorder.start)
    q, none = torch.randn(1, 64, 2, 64).bfloat16(), torch.zeros(1, 0, 2, 64).bfloat16()
    assert launcher.run(none, q, q)[0].shape == (1, 0, 2, 64)
    assert recorder.grids == []
    launcher.run(q, none, none)
    assert recorder.grids == [2]


# ---- kernels that take tensor maps
MAP = struct.Struct("=Q4Q3Q4I")
"""What stands for a descriptor: address, extents, strides, box."""


class SpecialisedRecorder(Recorder):
    """Tensor maps as plain numbers, and one counter.

    Args:
        address_at: offset of the address in a map; only at 0 may a map be patched instead of made anew.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, persistent: bool, address_at: int = 0) -> None:
        pointers = 2 if persistent else 1
        super().__init__(
            monkeypatch, SPECIALISED[persistent], -(-(4 * 128 + pointers * 8 + 7 * 4) // 64) * 64
        )
        self.pointers = pointers
        self.address_at = address_at
        self.encoded: list[int] = []
        self.asked: list[tuple[int, int]] = []
        self.prepared: list[int] = []

        def encode(address: int, dims: object, strides: object, box: object, element_bytes: int) -> bytes:
            assert element_bytes == 2
            self.encoded.append(address)
            data = MAP.pack(address, *dims, *strides, *box)  # type: ignore[misc]
            return (b"\0" * address_at + data).ljust(128, b"\0")

        class Counters:
            def prepare(_, device: int, count: int = 1) -> None:
                self.prepared.append(len(self.structs))

            def address(_, device: int, stream: int, count: int = 1) -> int:
                self.asked.append((device, stream))
                return COUNTER_ADDRESS

        monkeypatch.setattr(tensor_maps, "encode_tensor_map", encode)
        monkeypatch.setattr(launch_module, "COUNTERS", Counters())
        tensor_maps.address_comes_first.cache_clear()

    def start(
        self,
        function: object,
        grid: int,
        threads: int,
        smem: int,
        device: int,
        stream: int,
        arguments: int,
    ) -> None:
        address = ctypes.c_void_p.from_address(arguments).value
        assert address is not None and address % 64 == 0, "a tensor map stands on 64 bytes"
        assert smem == self.kernel.plan.smem_bytes
        super().start(function, grid, threads, smem, device, stream, arguments)

    def sent(self) -> tuple[dict[str, tuple[int, ...]], dict[str, float]]:
        """The maps and the other fields of the last launch, by name."""
        raw = self.structs[-1]
        names = [param.name for param in self.kernel.plan.params]
        maps = {name: MAP.unpack_from(raw, 128 * i + self.address_at) for i, name in enumerate(names[:4])}
        values = struct.unpack_from(f"={self.pointers}Q6if", raw, 512)
        return maps, dict(zip(names[4:], values, strict=True))


@pytest.fixture(autouse=True)
def forget_the_driver() -> Iterator[None]:
    """What a stand-in for the driver said of tensor maps is not remembered."""
    yield
    tensor_maps.address_comes_first.cache_clear()


@pytest.mark.parametrize("address_at", [0, 8])
@pytest.mark.parametrize("persistent", [True, False])
def test_tensor_maps_carry_address_extents_strides_and_box(
    monkeypatch: pytest.MonkeyPatch, persistent: bool, address_at: int
) -> None:
    """Columns first, strides in bytes; whether the address may be patched or the map is made anew."""
    recorder = SpecialisedRecorder(monkeypatch, persistent, address_at)
    launcher = Launcher(recorder.kernel.manifest, no_code, load=recorder.load, start=recorder.start)
    for _ in range(2):  # the second call has the first's signature and addresses of its own
        q, k = torch.randn(2, 300, 4, 64).bfloat16(), torch.randn(2, 100, 2, 64).bfloat16()
        v = torch.randn(2, 100, 2, 3, 64).bfloat16()[..., 1, :]
        out, lse = launcher.run(q, k, v, softmax_scale=-0.5, return_lse=True)
        maps, values = recorder.sent()
        block_m, block_n = recorder.kernel.plan.block_m, recorder.kernel.plan.block_n
        assert maps["q_map"] == (q.data_ptr(), 64, 300, 4, 2, 512, 128, 153600, 64, block_m, 1, 1)
        assert maps["k_map"] == (k.data_ptr(), 64, 100, 2, 2, 256, 128, 25600, 64, block_n, 1, 1)
        assert maps["v_map"] == (v.data_ptr(), 64, 100, 2, 2, 768, 384, 76800, 64, block_n, 1, 1)
        assert maps["out_map"] == (out.data_ptr(), 64, 300, 4, 2, 512, 128, 153600, 64, 64, 1, 1)
        assert lse is not None and values["lse"] == lse.data_ptr()
        assert values.get("tile_counter") == (COUNTER_ADDRESS if persistent else None)
        sizes = ("batch", "seqlen_q", "seqlen_k", "num_heads_q", "group", "scale_is_negative")
        assert tuple(values[size] for size in sizes) == (2, 300, 100, 4, 2, 1)
        assert values["softmax_scale_log2"] == pytest.approx(0.5 * 1.4426950408889634)


def test_a_known_signature_makes_no_map_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the address comes first it is patched; elsewhere each call makes its four maps."""
    q = torch.randn(1, 64, 2, 64).bfloat16()
    for address_at, again in ((0, 0), (8, 4)):
        recorder = SpecialisedRecorder(monkeypatch, True, address_at)
        launcher = Launcher(recorder.kernel.manifest, no_code, load=recorder.load, start=recorder.start)
        launcher.run(q, q, q)
        before = len(recorder.encoded)
        launcher.run(q, q, q)
        assert len(recorder.encoded) - before == again


def test_a_dimension_of_one_has_a_stride_that_the_copy_engine_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single batch, head or row may have any stride in torch; the map says 16 bytes. No keys: one row of them."""
    recorder = SpecialisedRecorder(monkeypatch, True)
    launcher = Launcher(recorder.kernel.manifest, no_code, load=recorder.load, start=recorder.start)
    q = torch.randn(1, 1, 1, 64).bfloat16().as_strided((1, 1, 1, 64), (3, 5, 7, 1))
    launcher.run(q, torch.zeros(1, 0, 1, 64).bfloat16(), torch.zeros(1, 0, 1, 64).bfloat16())
    maps, values = recorder.sent()
    assert maps["q_map"][1:8] == maps["k_map"][1:8] == (64, 1, 1, 1, 16, 16, 16)
    assert values["seqlen_k"] == 0


def test_a_persistent_grid_fills_the_gpu_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many blocks as multiprocessors, or as tiles where those are fewer; otherwise one per tile."""
    few, many = torch.randn(1, 100, 2, 64).bfloat16(), torch.randn(2, 7000, 4, 64).bfloat16()
    found = {}
    for persistent in (True, False):
        recorder = SpecialisedRecorder(monkeypatch, persistent)
        assert recorder.kernel.plan.block_m == 192
        launcher = Launcher(recorder.kernel.manifest, no_code, load=recorder.load, start=recorder.start)
        for q in (few, many):
            launcher.run(q, q, q)
        launcher.run(few[:, :0], few, few)
        found[persistent] = (recorder.grids, recorder.asked)
    assert found[True] == ([2, 132], [(-1, 7)] * 2)  # sm_90a has 132 multiprocessors
    assert found[False] == ([2, 2 * 4 * 37], [])  # ceil(7000 / 192) = 37 blocks of rows


def test_counters_are_at_hand_before_the_first_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are made with what is prepared of a signature, not while it is launched, and only where tiles are drawn."""
    q = torch.zeros(1, 64, 2, 64).bfloat16()
    for persistent in (True, False):
        recorder = SpecialisedRecorder(monkeypatch, persistent)
        launcher = Launcher(recorder.kernel.manifest, no_code, load=recorder.load, start=recorder.start)
        launcher.run(q[:, :0], q, q)
        for _ in range(2):
            launcher.run(q, q, q)
        assert recorder.prepared == ([0] if persistent else [])


def test_more_tiles_than_a_kernel_can_count_are_refused() -> None:
    """A persistent grid is small however many the tiles; their numbers, and a draw more for each block, stay i32."""
    tile = SPECIALISED[True].plan.block_m

    def reports(persistent: bool, heads: int, rows: int) -> tuple[LaunchReport, ...]:
        zeros = torch.zeros(1, 1, 1, 64).bfloat16()
        q, k = zeros.expand(2**15, rows, heads, 64), zeros.expand(2**15, 1, heads, 64)
        return SPECIALISED[persistent].explain_launch(q, k, k)

    (report,) = reports(True, 2**16 - 1, 1)  # 2^31 - 2^15 tiles
    assert report.grid == 132
    for persistent, heads, rows in ((True, 2**16, 1), (True, 2**15, tile + 1), (False, 2**16, 1)):
        with pytest.raises(attngen.ArgumentError, match=f"argument q: got {2**31} .*of work") as caught:
            reports(persistent, heads, rows)
        assert caught.value.expected == f"at most {2**31 - (132 if persistent else 1)}"


def test_a_call_of_few_keys_goes_to_the_shorter_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to its bound the shorter kernel is launched, beyond it the other; and nothing else is looked at."""
    SpecialisedRecorder(monkeypatch, True)
    kernel = attngen.compile({"target": "sm_90a", "problem": {"head_dim": 64}, "mask": "causal"})
    short, _ = kernel.call.programs
    bound = short.up_to
    assert bound is not None
    launched: list[str] = []

    class Named:
        """A module and the kernel of it that was asked for."""

        def function(self, name: str, smem_bytes: int, starts_early: bool) -> "Named":
            self.name = name
            return self

        def prepare(self, device: int, count: int = 1) -> None:
            pass

    def start(function: Named, *rest: object) -> None:
        launched.append(function.name)

    launcher = Launcher(kernel.manifest, no_code, load=lambda cubin: Named(), start=start)
    for seqlen_k, expected in ((bound, short), (bound + 1, kernel.plan), (0, short)):
        q, k = torch.empty(1, 8, 4, 64, device="meta"), torch.empty(1, seqlen_k, 2, 64, device="meta")
        q, k = q.bfloat16(), k.bfloat16()
        assert kernel.serving(k) is expected
        (report,) = kernel.explain_launch(q, k, k)
        assert report.kernel == expected.name
        assert kernel.serving(k.transpose(1, 2), "bhsd") is expected
        launcher.run(*(torch.empty_like(x, device="cpu") for x in (q, k, k)))
        assert launched.pop() == expected.name
