"""The launcher, with a recorder in place of the driver: what a GPU would be handed."""

import ctypes
import struct

import pytest
import torch

import attngen
from attngen.runtime import Launcher

KERNEL = attngen.compile({"problem": {"head_dim": 64}, "mask": "causal"}, arch="sm_90a")


class Recorder:
    """Stands for the driver: modules without code, launches kept as the bytes of their parameters."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.structs: list[bytes] = []
        self.grids: list[int] = []
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)

    def load(self, cubin: bytes) -> "Recorder":
        return self

    def function(self, name: str, smem_bytes: int) -> "Recorder":
        return self

    def prepare(self, device: int) -> None:
        pass

    def start(
        self, function: object, grid: int, threads: int, smem: int, stream: int, arguments: int
    ) -> None:
        assert (threads, stream) == (KERNEL.plan.kernel.threads, 7)
        address = ctypes.c_void_p.from_address(arguments).value
        assert address is not None
        self.structs.append(ctypes.string_at(address, 8 * 17 + 4 * 6))
        self.grids.append(grid)


def fields(raw: bytes) -> dict[str, float]:
    values = struct.unpack("=5Q12q5if", raw)
    return dict(zip((param.name for param in KERNEL.manifest.kernels[0].params), values, strict=True))


def test_the_struct_carries_what_the_manifest_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pointers, strides, sizes and scale stand where C puts them; lse is 0 unless asked for."""
    recorder = Recorder(monkeypatch)
    launcher = Launcher(KERNEL.manifest, b"", recorder.load, recorder.start)
    q, k = torch.randn(2, 300, 4, 64).bfloat16(), torch.randn(2, 100, 2, 64).bfloat16()
    out, lse = launcher(q, k, k, softmax_scale=-0.5)
    sent = fields(recorder.structs[0])
    assert (sent["q"], sent["v"], sent["out"], sent["lse"]) == (q.data_ptr(), k.data_ptr(), out.data_ptr(), 0)
    assert (sent["q_stride_batch"], sent["k_stride_seqlen"], sent["out_stride_head"]) == (300 * 256, 128, 64)
    assert (sent["seqlen_q"], sent["seqlen_k"], sent["num_heads_q"], sent["group"]) == (300, 100, 4, 2)
    assert sent["scale_is_negative"] == 1
    assert sent["softmax_scale_log2"] == pytest.approx(0.5 * 1.4426950408889634)
    assert recorder.grids == [2 * 4 * 3] and lse is None


def test_fresh_tensors_of_a_known_signature_get_their_own_pointers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered of a signature never holds a pointer."""
    recorder = Recorder(monkeypatch)
    launcher = Launcher(KERNEL.manifest, b"", recorder.load, recorder.start)
    for _ in range(3):
        q = torch.randn(1, 64, 2, 64).bfloat16()
        out, lse = launcher(q, q, q, return_lse=True)
        sent = fields(recorder.structs[-1])
        assert (sent["q"], sent["out"]) == (q.data_ptr(), out.data_ptr())
        assert lse is not None and sent["lse"] == lse.data_ptr() and lse.shape == (1, 2, 64)


def test_a_misaligned_pointer_of_a_known_signature_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alignment is a matter of the call, not of the signature."""
    recorder = Recorder(monkeypatch)
    launcher = Launcher(KERNEL.manifest, b"", recorder.load, recorder.start)
    storage = torch.randn(64 * 2 * 64 + 1).bfloat16()
    good, bad = storage[:-1].view(1, 64, 2, 64), storage[1:].view(1, 64, 2, 64)
    launcher(good, good, good)
    with pytest.raises(attngen.ArgumentError, match="argument q"):
        launcher(bad, good, good)
    assert len(recorder.grids) == 1


def test_an_empty_output_launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No queries: no grid. No keys: the kernel must still write zeros."""
    recorder = Recorder(monkeypatch)
    launcher = Launcher(KERNEL.manifest, b"", recorder.load, recorder.start)
    q, none = torch.randn(1, 64, 2, 64).bfloat16(), torch.zeros(1, 0, 2, 64).bfloat16()
    assert launcher(none, q, q)[0].shape == (1, 0, 2, 64)
    assert recorder.grids == []
    launcher(q, none, none)
    assert recorder.grids == [2]
