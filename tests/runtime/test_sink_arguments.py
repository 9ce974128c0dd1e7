"""A learned sink as an argument: what is refused, by name, and where the launcher puts what is taken."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import attngen
from attngen.errors import ArgumentError
from attngen.plan import SINK_VALUES, Manifest
from attngen.runtime import Launcher
from attngen.runtime.prepared import offsets
from tests.plans import no_code

SPEC = {"problem": {"head_dim": 64}, "mask": "causal", "sink": "per_head"}
KINDS = ("fa2", "serial", "warp_specialized", "pingpong")
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k = torch.zeros(2, 16, 4, 64, dtype=torch.bfloat16), torch.zeros(2, 24, 2, 64, dtype=torch.bfloat16)
    return q, k, k


@pytest.mark.parametrize(
    ("sink", "said"),
    [
        (None, r"argument sink: got nothing, expected a torch tensor: .*f32, bf16 or f16\[num_heads_q\]"),
        (0.5, "argument sink: got float, expected a torch tensor"),
        ([0.5] * 4, "argument sink: got list"),
        (
            torch.zeros(4, dtype=torch.float64),
            r"dtype torch.float64, .*float32, torch.bfloat16 or torch.float16",
        ),
        (torch.zeros(4, dtype=torch.int32), "dtype torch.int32"),
        (torch.zeros(2), r"shape \(2,\), .*where num_heads_q is 4"),
        (torch.zeros(1), r"shape \(1,\), .*where num_heads_q is 4"),
        (torch.zeros(4, 1), "2 dimensions, expected 1"),
        (torch.zeros(()), "0 dimensions, expected 1"),
        (torch.zeros(4, device="meta"), "device meta, expected cpu, the device of q"),
        (torch.zeros(4).to_sparse(), "layout torch.sparse_coo"),
        (
            torch.zeros(4, requires_grad=True),
            r"(?s)requires grad.*say gradients: \[q, k, v, sink\] in the spec",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("arch", ["simulator", "sm_90a"])
def test_what_is_no_sink_is_refused_by_name(arch: str, sink: Any, said: str) -> None:
    """Missing or wrong, on the simulator and before a launch alike."""
    kernel = attngen.compile(SPEC, arch=arch)
    declared = {} if sink is None else {"sink": sink}
    with pytest.raises(ArgumentError, match=said):
        kernel(*inputs(), **declared)


def test_without_the_key_a_sink_is_refused() -> None:
    """By its name, with the key that would take it; `gradients` or not."""
    for more in ({}, {"gradients": ["q", "k", "v"]}):
        kernel = attngen.compile({"problem": {"head_dim": 64}, **more}, arch="simulator")
        with pytest.raises(ArgumentError, match="(?s)argument sink: .*say sink: per_head in the spec"):
            kernel(*inputs(), sink=torch.zeros(4))


def test_a_backward_pass_wants_the_sink_of_its_call() -> None:
    """As it wants whatever else was passed by name."""
    kernel = attngen.compile(SPEC | {"gradients": ["q", "k", "v", "sink"]}, arch="simulator")
    q, k, v = inputs()
    out, lse = kernel(q, k, v, return_lse=True, sink=torch.zeros(4))
    with pytest.raises(ArgumentError, match="argument sink: got nothing"):
        kernel.backward(out, q, k, v, out, lse)
    with pytest.raises(ArgumentError, match="argument sink: got a tensor that requires grad"):
        kernel.backward(out, q, k, v, out, lse, sink=torch.zeros(4, requires_grad=True))
    grads = tuple(torch.zeros_like(x) for x in (q, k, v))
    with pytest.raises(ArgumentError, match="accumulate: got True beside gradients of sink"):
        kernel.backward(out, q, k, v, out, lse, grads=grads, accumulate=True, sink=torch.zeros(4))
    made = kernel.backward(out, q, k, v, out, lse, grads=grads, sink=torch.zeros(4))
    assert made[:3] == grads and made[3].shape == (4,)


@dataclass(frozen=True)
class Function:
    """A kernel without code."""

    name: str

    def prepare(self, device: int, count: int = 1) -> None:
        pass


class Sent:
    """Stands for the driver, and keeps the parameters of every launch by the values that they carry."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, manifest: Manifest) -> None:
        self.manifest = manifest
        self.launches: list[tuple[str, Callable[[str], int]]] = []
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
        monkeypatch.setattr("attngen.runtime.launch.COUNTERS.prepare", lambda device, count: None)
        monkeypatch.setattr("attngen.runtime.launch.COUNTERS.address", lambda device, stream, count: 0xC0C0)
        monkeypatch.setattr("attngen.runtime.prepared.address_comes_first", lambda: True)
        monkeypatch.setattr("attngen.runtime.prepared.encode", lambda map_, address: bytes(128))

    def load(self, cubin: bytes) -> "Sent":
        return self

    def function(self, name: str, smem_bytes: int, starts_early: bool) -> Function:
        return Function(name)

    def start(
        self, function: Function, grid: int, threads: int, smem: int, device: int, stream: int, at: int
    ) -> None:
        address, starts = (
            ctypes.c_void_p.from_address(at).value,
            offsets(self.manifest.kernel_of[function.name]),
        )
        assert address is not None
        size = max(starts.values()) + 8
        raw = ctypes.string_at(address, size)
        self.launches.append(
            (function.name, lambda value: int.from_bytes(raw[starts[value] : starts[value] + 8], "little"))
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_launch_carries_the_sink_in_its_format(
    kind: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three pointers one is not 0, with the steps from head to head; formats take turns in one launcher."""
    kernel = attngen.compile(SPEC | {"schedule": {"kind": kind}}, arch="sm_90a")
    sent = Sent(monkeypatch, kernel.manifest)
    launcher = Launcher(kernel.manifest, no_code, load=sent.load, start=sent.start)
    q, k, v = inputs()
    others = [torch.zeros(4, dtype=each) for each in DTYPES.values()]
    sink = torch.zeros(12, dtype=DTYPES[dtype])[1::3]
    for each in (*others, sink, sink.clone()):
        launcher.run(q, k, v, return_lse=True, declared={"sink": each})
    for each, step, (name, carried) in zip((sink, sink.clone()), (3, 1), sent.launches[-2:], strict=True):
        assert name == kernel.plan.name
        pointers = {value: carried(f"{value}.ptr") for value in SINK_VALUES}
        assert {value for value, pointer in pointers.items() if pointer} == {f"sink_{dtype}"}
        assert carried(f"sink_{dtype}.stride_0") == step
        assert step == 1 or pointers[f"sink_{dtype}"] == each.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_backward_pass_makes_the_gradient_in_the_format_of_the_sink(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel that sums it is launched with that pointer alone, behind the one that prepares rows."""
    kernel = attngen.compile(SPEC | {"gradients": ["q", "k", "v", "sink"]}, arch="sm_90a")
    sent = Sent(monkeypatch, kernel.manifest)
    launcher = Launcher(kernel.manifest, no_code, load=sent.load, start=sent.start)
    q, k, v = inputs()
    sink, lse = torch.zeros(4, dtype=DTYPES[dtype]), torch.zeros(2, 4, 16)
    declared = {"sink": sink, "dout": q, "out": q, "lse": lse}
    wanted = kernel.gradients_of(declared)
    made = launcher.make(wanted, q, k, v, declared=declared, intake="gradients")
    assert [x.dtype for x in made] == [*[torch.bfloat16] * 3, DTYPES[dtype]] and made[3].shape == (4,)
    names = [name for name, _ in sent.launches]
    last, carried = sent.launches[-1]
    assert last.endswith("_sink") and names[0].endswith("_rows") and len(names) == 4
    pointers = {each: carried(f"gradient.sink_{each}.ptr") for each in DTYPES}
    assert pointers == {each: made[3].data_ptr() if each == dtype else 0 for each in DTYPES}
    assert carried(f"sink_{dtype}.ptr") == sink.data_ptr()
    assert carried("delta.ptr") and carried("lse_log2.ptr") - carried("delta.ptr") == 2 * 4 * 128 * 4


def test_a_launcher_shares_tables_whatever_the_sink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers have sinks of their own, and tables are of what the mask reads; those of other ids are refused."""
    spec = SPEC | {
        "mask": "document(doc)",
        "tensors": {"doc": "i32[batch, seqlen_k]"},
        "schedule": {"kind": "fa2"},
    }
    kernel = attngen.compile(spec, arch="sm_90a")
    sent = Sent(monkeypatch, kernel.manifest)
    launcher = Launcher(kernel.manifest, no_code, load=sent.load, start=sent.start)
    (q, k, v), doc = inputs(), torch.zeros(2, 24, dtype=torch.int32)
    tables = launcher.tables(q, k, v, "bshd", {"doc": doc, "sink": torch.zeros(4)})
    for sink in (torch.ones(4), torch.ones(4, dtype=torch.bfloat16)):
        launcher.run(q, k, v, declared={"sink": sink, "doc": doc}, tables=tables)
        name, carried = sent.launches[-1]
        found = {carried(f"{value}.ptr") for value in SINK_VALUES}
        assert name == kernel.plan.name and found == {0, sink.data_ptr()}
    with pytest.raises(ArgumentError, match="tables of doc with address"):
        launcher.run(q, k, v, declared={"sink": torch.ones(4), "doc": doc.clone()}, tables=tables)
