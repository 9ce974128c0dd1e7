"""Scalars and tensors that a call passes by name: what is refused, and where the launcher puts the rest."""

import ctypes
import math
import struct
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import attngen
from attngen.bind import check_declared
from attngen.expr import PAGE_SIZES, SIZE_NAMES, TOKENS
from attngen.plan import RUNTIME_SIZES, KernelEntry
from attngen.runtime import Launcher
from tests.plans import no_code

SPEC = {
    "problem": {"head_dim": 64},
    "mask": "document(doc) and kv_idx < lens[b] and (strict or kv_idx % 2 == 0) and kv_idx + reach >= q_idx",
    "score": "softcap(score, cap) + bias[h, q_idx, min(kv_idx, 3)] + t[0, 1] + u[b, 0] + low * 2.0",
    "scalars": {"cap": "f32 = 30.0", "low": "f32", "reach": "i32", "strict": "bool"},
    "tensors": {
        "doc": "i32[batch, seqlen_k]",
        "lens": "i32[batch]",
        "bias": "bf16[num_heads_q, seqlen_q, 4]",
        "t": "f16[n, wide]",
        "u": "f32[batch, n]",
    },
    "schedule": {"kind": "warp_specialized"},
}
KERNEL = attngen.compile(SPEC, arch="sm_90a")
SIZES = {
    "batch": 2,
    "seqlen_q": 16,
    "seqlen_k": 24,
    "num_heads_q": 4,
    "num_heads_kv": 2,
    "group": 2,
}
CPU = torch.device("cpu")


def good() -> dict[str, Any]:
    return {
        "low": 0.5,
        "reach": -7,
        "strict": True,
        "doc": torch.zeros(2, 24, dtype=torch.int32),
        "lens": torch.full((2,), 24, dtype=torch.int32),
        "bias": torch.zeros(4, 16, 4, dtype=torch.bfloat16),
        "t": torch.zeros(5, 3, dtype=torch.float16),
        "u": torch.zeros(2, 5),
    }


def check(passed: Mapping[str, Any]) -> Any:
    return check_declared(KERNEL.manifest, KERNEL.manifest.intakes[0], passed, SIZES, CPU)


def test_what_is_declared_passes() -> None:
    """Defaults stand for what is left out, and a new name is bound to the size of its dimension."""
    found = check(good())
    assert found.scalars == {"cap": 30.0, "low": 0.5, "reach": -7, "strict": True}
    assert list(found.tensors) == [value.name for value in KERNEL.manifest.declared]
    assert (found.sizes["n"], found.sizes["wide"], found.sizes["batch"]) == (5, 3, 2)
    assert check(good() | {"cap": 2}).scalars["cap"] == 2.0
    assert check(good() | {"low": 0.1}).scalars["low"] == struct.unpack("f", struct.pack("f", 0.1))[0]
    assert check(good() | {"low": -math.inf}).scalars["low"] == -math.inf


def test_any_strides_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor may be a slice, a transpose or repeated: its strides are the kernel's to know."""
    spread = torch.zeros(24, 2, dtype=torch.int32).T
    repeated = torch.zeros(1, dtype=torch.bfloat16).expand(4, 16, 4)
    recorder = Recorder(monkeypatch, KERNEL)
    recorder.run(*tensors(), **good() | {"doc": spread, "bias": repeated})
    for _, _, sent in recorder.sent:
        assert (sent["tensor.doc.stride_0"], sent["tensor.doc.stride_1"]) == (1, 2)
        assert [sent[f"tensor.bias.stride_{i}"] for i in range(3)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("doc", None, "nothing.*i32\\[batch, seqlen_k\\]"),
        ("doc", [[1, 2]], "list.*torch tensor"),
        ("doc", torch.zeros(2, 24, dtype=torch.int32).to_sparse(), "dense"),
        ("doc", torch.zeros(2, 24, dtype=torch.int64), "int64.*int32.*pass doc.to\\(torch.int32\\)"),
        ("bias", torch.zeros(4, 16, 4), "float32.*bfloat16"),
        ("doc", torch.zeros(2, 24, dtype=torch.int32, device="meta"), "device meta.*cpu"),
        ("u", torch.zeros(2, 5, requires_grad=True), "grad.*pass u.detach\\(\\)"),
        ("doc", torch.zeros(48, dtype=torch.int32), "1 dimensions.*2: i32\\[batch, seqlen_k\\]"),
        ("doc", torch.zeros(2, 23, dtype=torch.int32), "shape \\(2, 23\\).*seqlen_k is 24"),
        ("lens", torch.zeros(3, dtype=torch.int32), "shape \\(3,\\).*batch is 2"),
        ("bias", torch.zeros(2, 16, 4, dtype=torch.bfloat16), "num_heads_q is 4"),
        ("bias", torch.zeros(4, 16, 5, dtype=torch.bfloat16), "4 is 4"),
        ("u", torch.zeros(2, 6), "n is 5"),
        ("t", torch.zeros(5, 0, dtype=torch.float16), "at least one wide"),
        ("low", None, "nothing.*f32 without default"),
        ("low", float("nan"), "nan.*a number"),
        ("low", True, "True.*a number"),
        ("low", "1.0", "'1.0'.*a number"),
        ("low", torch.ones(1), "tensor of shape.*a number"),
        ("reach", 1.0, "1.0.*an integer"),
        ("reach", True, "True.*an integer"),
        ("reach", 2**31, "2147483648.*between -2\\^31 and 2\\^31"),
        ("reach", -(2**31), "-2147483648.*between"),
        ("strict", 1, "1.*True or False"),
        ("strict", "yes", "'yes'.*True or False"),
    ],
)
def test_a_fault_is_named(name: str, value: object, words: str) -> None:
    """The error holds the argument, what it was and what it must be, and the cure where one line cures it."""
    passed = good()
    if value is None:
        passed.pop(name)
    else:
        passed[name] = value
    with pytest.raises(attngen.ArgumentError, match=f"argument {name}: .*(?s:{words})") as caught:
        check(passed)
    assert caught.value.argument == name


def test_a_name_that_is_not_declared_is_refused_with_the_nearest() -> None:
    """A slip of the pen is told from a kernel that declares nothing."""
    with pytest.raises(attngen.ArgumentError, match="argument bais.*declares: bias$") as caught:
        check(good() | {"bais": 1})
    assert caught.value.argument == "bais"
    with pytest.raises(attngen.ArgumentError, match="argument zzz.*doc, lens"):
        check(good() | {"zzz": 1})
    plain = attngen.compile({"problem": {"head_dim": 64}}, arch="sm_90a")
    with pytest.raises(attngen.ArgumentError, match="argument bias.*no such argument"):
        check_declared(plain.manifest, plain.manifest.intakes[0], {"bias": 1}, SIZES, CPU)


def test_a_tensor_that_requires_grad_passes_where_no_grad_is_made() -> None:
    """Under no_grad a parameter of a model is a tensor like any other."""
    with torch.no_grad():
        check(good() | {"u": torch.zeros(2, 5, requires_grad=True)})


def tensors(seqlen_q: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k = torch.zeros(2, seqlen_q, 4, 64).bfloat16(), torch.zeros(2, 24, 2, 64).bfloat16()
    return q, k, k.clone()


@pytest.mark.parametrize("runs", ["simulator", "launcher"])
def test_a_call_checks_what_it_is_passed(runs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPU tensors and before a launch: the same errors, of a known signature too, and nothing is launched."""
    call = KERNEL if runs == "simulator" else Recorder(monkeypatch, KERNEL).run
    passed = good()
    for _ in range(2):
        for name, value in (("doc", None), ("reach", 2**31), ("u", torch.zeros(2, 6)), ("bais", 1)):
            with pytest.raises(attngen.ArgumentError) as caught:
                call(*tensors(), **passed | {name: value})
            assert caught.value.argument == name
        call(*tensors(), **passed)


class Recorder:
    """A launcher whose driver keeps what each kernel was sent, by field of its parameter struct."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kernel: attngen.Kernel) -> None:
        self.sent: list[tuple[str, int, dict[str, Any]]] = []
        self.kernels = {entry.name: entry for entry in kernel.manifest.kernels}
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False, raising=False)
        monkeypatch.setattr("attngen.runtime.launch.COUNTERS", _Counters())
        monkeypatch.setattr("attngen.runtime.tensor_maps.encode_tensor_map", lambda *map_: bytes(128))
        monkeypatch.setattr("attngen.runtime.prepared.address_comes_first", lambda: True)
        self.launcher = Launcher(kernel.manifest, no_code, load=lambda cubin: _Module(), start=self._start)

    def run(self, *tensors: torch.Tensor, softmax_scale: float | None = None, **declared: Any) -> Any:
        return self.launcher.run(*tensors, softmax_scale=softmax_scale, declared=declared)

    def _start(
        self,
        function: "_Function",
        grid: int,
        threads: int,
        smem: int,
        device: int,
        stream: int,
        arguments: int,
    ) -> None:
        address = ctypes.c_void_p.from_address(arguments).value
        assert address is not None
        self.sent.append((function.name, grid, read_struct(self.kernels[function.name], address)))


class _Function:
    def __init__(self, name: str) -> None:
        self.name = name

    def prepare(self, device: int, count: int = 1) -> None:
        pass


class _Module:
    def function(self, name: str, smem_bytes: int, starts_early: bool) -> _Function:
        return _Function(name)


class _Counters:
    def prepare(self, device: int, count: int = 1) -> None:
        pass

    def address(self, device: int, stream: int, count: int = 1) -> int:
        return 0xC0C0


def read_struct(kernel: KernelEntry, address: int) -> dict[str, Any]:
    """The fields of a parameter struct as C lays them out, each on a multiple of its size; maps on 64 bytes."""
    formats: dict[str, tuple[int, int, Callable[[bytes], Any]]] = {
        "pointer": (8, 8, lambda raw: struct.unpack("=Q", raw)[0]),
        "i64": (8, 8, lambda raw: struct.unpack("=q", raw)[0]),
        "i32": (4, 4, lambda raw: struct.unpack("=i", raw)[0]),
        "f32": (4, 4, lambda raw: struct.unpack("=f", raw)[0]),
        "tensor_map": (128, 64, lambda raw: raw),
    }
    found, at = {}, 0
    for param in kernel.params:
        size, alignment, read = formats[param.ctype]
        at += -at % alignment
        found[param.value] = read(ctypes.string_at(address + at, size))
        at += size
    return found


def test_the_struct_carries_what_is_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses, strides in elements, bound sizes, scalars and the score's scale stand where C puts their fields."""
    recorder, passed = Recorder(monkeypatch, KERNEL), good()
    passed["doc"] = torch.zeros(24, 2, dtype=torch.int32).T
    passed["t"] = torch.zeros(10, 6, dtype=torch.float16)[::2, ::2]
    recorder.run(*tensors(), softmax_scale=-0.5, **passed)
    names = [name for name, *_ in recorder.sent]
    assert names == [f"{KERNEL.plan.name}_tables", KERNEL.plan.name]
    for _, grid, sent in recorder.sent:
        assert grid > 0
        for name in ("doc", "lens", "bias", "t", "u"):
            assert sent[f"tensor.{name}.ptr"] == passed[name].data_ptr()
            for i, stride in enumerate(passed[name].stride()):
                assert sent[f"tensor.{name}.stride_{i}"] == stride
        assert (sent["scalar.cap"], sent["scalar.low"]) == (30.0, 0.5)
        assert (sent["scalar.reach"], sent["scalar.strict"]) == (-7, 1)
        assert (sent["size.n"], sent["size.wide"], sent["batch"]) == (5, 3, 2)
        assert sent["softmax_scale"] == -0.5
        assert sent["score_factor_log2"] == pytest.approx(math.log2(math.e))
    tables, attention = (sent for *_, sent in recorder.sent)
    spaces = KERNEL.manifest.kept
    addresses = [attention[f"{space}.ptr"] for space in spaces]
    assert addresses == [tables[f"{space}.ptr"] for space in spaces]
    assert spaces and 0 not in addresses and len(set(addresses)) == len(addresses)


@pytest.mark.parametrize("dim", sorted({*RUNTIME_SIZES} - {*SIZE_NAMES, *TOKENS, *PAGE_SIZES}))
def test_a_dimension_is_no_size_of_the_launch(dim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`group` and `num_sms` are names like any other for a tensor to bind, and the kernel's own stay what they are."""
    sent = []
    for name in (dim, "n"):
        tensor = {"tensors": {"t": f"f32[{name}]"}, "scalars": {}}
        kernel = attngen.compile(SPEC | {"mask": "causal", "score": "score + t[h]"} | tensor, arch="sm_90a")
        recorder = Recorder(monkeypatch, kernel)
        recorder.run(*tensors(), t=torch.zeros(7))
        _, grid, fields = recorder.sent[-1]
        sent.append((grid, fields["group"], fields[f"size.{name}"]))
    assert sent[0] == sent[1] and sent[0][1:] == (2, 7)


def test_each_call_sends_its_own_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """A known signature holds no address and no scalar of another call; other strides are another signature."""
    recorder = Recorder(monkeypatch, KERNEL)
    for reach, strict, doc in (
        (1, True, torch.zeros(2, 24, dtype=torch.int32)),
        (1, False, torch.zeros(2, 24, dtype=torch.int32)),
        (0, False, torch.zeros(2, 48, dtype=torch.int32)[:, ::2]),
        (1, True, torch.zeros(24, 2, dtype=torch.int32).T),
    ):
        recorder.run(*tensors(), **good() | {"reach": reach, "strict": strict, "doc": doc})
        _, _, sent = recorder.sent[-1]
        assert (sent["scalar.reach"], sent["scalar.strict"]) == (reach, strict)
        assert sent["tensor.doc.ptr"] == doc.data_ptr()
        assert (sent["tensor.doc.stride_0"], sent["tensor.doc.stride_1"]) == doc.stride()


def test_without_rows_nothing_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of no query launches neither kernel; declared tensors are checked all the same."""
    recorder = Recorder(monkeypatch, KERNEL)
    empty = {"bias": torch.zeros(4, 0, 4, dtype=torch.bfloat16)}
    recorder.run(*tensors(0), **good() | empty)
    assert recorder.sent == []
    with pytest.raises(attngen.ArgumentError, match="argument bias"):
        recorder.run(*tensors(0), **good())


def test_a_large_factor_of_the_score_stays_in_the_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant that the exponentials take must be an f32 and normal when it is scaled to log2; no other is taken."""
    for factor, taken in (("3.0", 3.0), ("1e38 * 3.0", 1.0), ("1e-40", 1.0)):
        spec = {"problem": {"head_dim": 64}, "score": f"{factor} * score", "schedule": {"kind": "fa2"}}
        recorder = Recorder(monkeypatch, attngen.compile(spec, arch="sm_90a"))
        recorder.run(*tensors())
        ((_, _, sent),) = recorder.sent
        assert sent["score_factor_log2"] == pytest.approx(taken * math.log2(math.e))


def test_attention_joins_declarations() -> None:
    """What is declared beside the texts, and what Python expressions bring, is one spec; values go by keyword."""
    q = torch.randn(1, 9, 2, 32, generator=torch.Generator().manual_seed(0))
    slopes = torch.tensor([0.5, 2.0])
    written = attngen.attention(
        q,
        q,
        q,
        "kv_idx <= q_pos + reach",
        "score + slopes[h] * (kv_idx - q_idx)",
        scalars={"reach": "i32 = 1"},
        tensors={"slopes": "f32[num_heads_q]"},
        slopes=slopes,
    )
    traced = attngen.attention(
        q,
        q,
        q,
        attngen.expression(
            lambda q_pos, kv_idx, reach: kv_idx <= q_pos + reach, scalars={"reach": "i32 = 1"}
        ),
        attngen.expression(
            lambda score, h, q_idx, kv_idx, slopes: score + slopes[h] * (kv_idx - q_idx),
            tensors={"slopes": "f32[num_heads_q]"},
        ),
        slopes=slopes,
    )
    assert isinstance(written, torch.Tensor) and isinstance(traced, torch.Tensor)
    assert torch.equal(written, traced)
    assert not torch.equal(written, attngen.attention(q, q, q))


def test_attention_refuses_two_declarations_of_one_name() -> None:
    """A mask and a score that mean different things by a name cannot be joined."""
    q = torch.zeros(1, 4, 1, 32)
    mask = attngen.expression(lambda kv_idx, n: kv_idx < n, scalars={"n": "i32 = 3"})
    with pytest.raises(attngen.ArgumentError, match="argument scalars: .*n: i32 = 3.*n: i32 = 4") as caught:
        attngen.attention(q, q, q, mask, scalars={"n": "i32 = 4"})
    assert caught.value.argument == "scalars"


def test_a_call_with_tables_fills_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making tables launches their kernel alone; a call that brings them launches the other, on their addresses."""
    monkeypatch.setattr("torch.cuda.device", lambda device: nullcontext())
    recorder, passed = Recorder(monkeypatch, KERNEL), good()
    tables = recorder.launcher.tables(*tensors(), "bshd", passed)
    recorder.launcher.run(*tensors(), declared=passed, tables=tables)
    assert [name for name, *_ in recorder.sent] == [f"{KERNEL.plan.name}_tables", KERNEL.plan.name]
    made, used = (sent for *_, sent in recorder.sent)
    assert isinstance(tables.memory, torch.Tensor)
    start = tables.memory.data_ptr()
    for name in KERNEL.manifest.kept:
        address = made[f"{name}.ptr"]
        assert start <= address == used[f"{name}.ptr"] < start + tables.memory.nbytes


def test_tables_of_another_call_are_refused_of_a_known_signature_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor elsewhere, one written to since, another scalar: nothing is launched."""
    monkeypatch.setattr("torch.cuda.device", lambda device: nullcontext())
    recorder, passed = Recorder(monkeypatch, KERNEL), good()
    tables = recorder.launcher.tables(*tensors(), "bshd", passed)
    recorder.run(*tensors(), **passed)
    launched = len(recorder.sent)
    for other, words in (
        (passed | {"doc": passed["doc"].clone()}, "tables of doc with address"),
        (passed | {"reach": 5}, "tables made with .*'reach': -7"),
        (passed | {"doc": passed["doc"].add_(1)}, "tables of doc with version 0"),
    ):
        for _ in range(2):
            with pytest.raises(attngen.ArgumentError, match=words):
                recorder.launcher.run(*tensors(), declared=other, tables=tables)
    assert len(recorder.sent) == launched


def test_a_scalar_that_is_none_is_refused_after_a_call_that_leaves_it_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A default stands for what is not passed, and for nothing that is."""
    recorder = Recorder(monkeypatch, KERNEL)
    recorder.run(*tensors(), **good())
    with pytest.raises(attngen.ArgumentError, match="argument cap: got nothing"):
        recorder.run(*tensors(), **good() | {"cap": None})


def test_tables_lie_side_by_side_in_memory_of_their_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """None overlaps the next, each starts on 256 bytes of what is allocated; other streams and threads have others."""
    made, fresh = [], torch.Tensor.new_empty

    def keep(q: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        made.append(fresh(q, *args, **options))
        return made[-1]

    def run_on(stream: int) -> dict[str, Any]:
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: stream)
        recorder.run(*tensors(), **good())
        _, _, sent = recorder.sent[-1]
        return sent

    recorder = Recorder(monkeypatch, KERNEL)
    monkeypatch.setattr(torch.Tensor, "new_empty", keep)
    for stream, known in ((7, 1), (7, 1), (8, 2), (7, 2), (8, 2)):
        sent = run_on(stream)
        assert len(made) == known
        memory = made[stream - 7]
        starts = [sent[f"{name}.ptr"] - memory.data_ptr() for name in KERNEL.manifest.kept]
        assert starts[0] == 0 and not any(start % 256 for start in starts)
        (report, *_) = KERNEL.explain_launch(*tensors())
        ends = [start + size for start, size in zip(starts, report.workspace_bytes.values(), strict=True)]
        assert all(end <= start for end, start in zip(ends, [*starts[1:], memory.nbytes], strict=True))
    thread = threading.Thread(target=run_on, args=(7,))
    thread.start()
    thread.join()
    assert len(made) == 3
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: True)
    for known in (4, 5):  # what a graph reads stays as it is for its replays
        run_on(7)
        assert len(made) == known


def test_an_empty_tensor_has_an_address_where_there_are_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens without a sequence are listed, and their tiles look up by sequence 0: nothing is read at address 0."""
    kernel = attngen.compile(
        {
            "problem": {"head_dim": 64, "queries": "ragged", "keys": "ragged"},
            "tensors": {"slopes": "f32[batch]"},
            "score": "score + slopes[b] * (kv_idx - q_idx)",
        },
        arch="sm_90a",
    )
    recorder, x = Recorder(monkeypatch, kernel), torch.zeros(5, 1, 64, dtype=torch.bfloat16)
    none = torch.zeros(1, dtype=torch.int32)
    recorder.run(x, x, x, cu_seqlens_q=none, cu_seqlens_k=none, slopes=torch.zeros(0))
    (_, tiles, of_list), (_, grid, sent) = recorder.sent
    assert (tiles, grid) == (1, 2) and 0 not in (sent["tensor.slopes.ptr"], of_list["tensor.slopes.ptr"])
