"""What a backward pass is handed, by a recorder in the place of the driver: bad arguments launch nothing."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

import attngen
from attngen.runtime import Launcher
from tests.gradients.backward_cases import BackwardCase
from tests.plans import no_code

CASE = BackwardCase("causal", lengths=(70, 70), heads=(4, 2), head_dim=(64, 64))
WARPS = replace(CASE, spec={"schedule": {"kind": "fa2"}})
"""Whose kernels need no tensor maps, which a driver makes."""
KERNEL = WARPS.kernel("sm_90a")
SHAPE = (2, 70, 4, 64)


class Recorded:
    """A kernel whose CPU tensors pass for a GPU's; names of what it launches are kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kernel: attngen.Kernel = KERNEL) -> None:
        self.started: list[str] = []
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
        self.launcher = Launcher(
            kernel.manifest, no_code, load=lambda cubin: self, start=lambda function, *rest: function()
        )
        monkeypatch.setattr(attngen.Kernel, "_machine", lambda kernel, q: self.launcher)

    def function(self, name: str, smem_bytes: int, starts_early: bool) -> Callable[[], None]:
        def launch() -> None:
            self.started.append(re.sub(r".*_[0-9a-f]{8}(_k\d+)?_", "", name))

        launch.prepare = lambda device: None  # type: ignore[attr-defined]
        return launch


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    return Recorded(monkeypatch)


def good() -> dict[str, Any]:
    (q, k, v, dout), _ = CASE.inputs_on("cpu")
    lse = torch.zeros(2, 4, 70)
    return {"dout": dout, "q": q, "k": k, "v": v, "out": torch.zeros_like(q), "lse": lse, "dlse": lse.clone()}


BAD: dict[str, tuple[dict[str, Callable[[], Any]], str]] = {
    "dout of f32": ({"dout": lambda: torch.zeros(SHAPE)}, "dout: got dtype torch.float32"),
    "dout of f16": ({"dout": lambda: torch.zeros(SHAPE).half()}, "dout: got dtype torch.float16"),
    "dout of no rows": ({"dout": lambda: torch.zeros(2, 69, 4, 64).bfloat16()}, "dout: got shape"),
    "dout of a sum": (
        {"dout": lambda: torch.ones((), dtype=torch.bfloat16).expand(SHAPE)},
        "dout: got stride 0 in the last dimension",
    ),
    "dout transposed": (
        {"dout": lambda: torch.zeros(2, 70, 64, 4).bfloat16().mT},
        "dout: got stride 4 in the last dimension",
    ),
    "dout off 16 bytes": (
        {"dout": lambda: torch.zeros(2 * 70 * 4 * 64 + 8).bfloat16()[4:-4].view(SHAPE)},
        "dout: got an address that is 8 bytes past",
    ),
    "dout elsewhere": (
        {"dout": lambda: torch.zeros(SHAPE, device="meta").bfloat16()},
        "dout: got device meta",
    ),
    "no dout": ({"dout": lambda: None}, "dout: got nothing"),
    "no out": ({"out": lambda: None}, "out: got nothing"),
    "out of f32": ({"out": lambda: torch.zeros(SHAPE)}, "out: got dtype torch.float32"),
    "out in columns": ({"out": lambda: torch.zeros(2, 70, 64, 4).bfloat16().mT}, "out: got stride 4"),
    "no lse": ({"lse": lambda: None}, "lse: got nothing"),
    "lse as q": ({"lse": lambda: torch.zeros(2, 70, 4)}, "lse: got shape"),
    "lse of f64": ({"lse": lambda: torch.zeros(2, 4, 70).double()}, "lse: got dtype torch.float64"),
    "dlse of bf16": ({"dlse": lambda: torch.zeros(2, 4, 70).bfloat16()}, "dlse: got dtype torch.bfloat16"),
    "dlse of one head": ({"dlse": lambda: torch.zeros(2, 70)}, "dlse: got 2 dimensions"),
    "grads on q": ({"grads": lambda: [torch.zeros(SHAPE)] * 3}, "dk: got shape"),
    "no heads of q": (
        {"q": lambda: torch.zeros(2, 70, 0, 64).bfloat16()},
        "q: got 0 heads, expected at least 1",
    ),
    "an unknown name": ({"dtype": lambda: 1}, "dtype: got an argument"),
    "another layout": ({"layout": lambda: "sbhd"}, "layout: got"),
}


@pytest.mark.parametrize("how", BAD)
def test_what_is_wrong_is_named_and_nothing_is_launched(how: str, recorded: Recorded) -> None:
    """By the first call of a signature and, where the pass has run with good arguments before, by a later one."""
    change, text = BAD[how]
    given = good()
    for _ in range(1 if how == "dout elsewhere" else 2):  # the number of meta's device is that of the CPU
        with pytest.raises(attngen.ArgumentError, match=f"argument {text}"):
            KERNEL.backward(**given | {name: make() for name, make in change.items()})
        assert recorded.started == []
        KERNEL.backward(**given)
        assert recorded.started == ["rows", "query_gradients", "key_gradients"]
        recorded.started.clear()


STRIDED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rows apart": lambda x: torch.zeros(*x.shape[:-1], 2**12, dtype=x.dtype)[..., : x.shape[-1]].copy_(x),
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "one row for all": lambda x: x[:, :1].expand(x.shape),
    "one batch for all": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("how", STRIDED)
def test_strides_are_read(how: str) -> None:
    """dout, out, lse and dlse of any strides give what dense ones do, on the simulator."""
    (q, k, v, dout), _ = CASE.inputs_on("cpu")
    out, lse = KERNEL(q, k, v, return_lse=True)
    strided = {name: STRIDED[how](x) for name, x in (("dout", dout), ("out", out))}
    strided |= {
        "lse": lse.transpose(0, 2).contiguous().transpose(0, 2),
        "dlse": torch.ones(()).expand(2, 4, 70),
    }
    dense = {name: x.contiguous() for name, x in strided.items()}
    found, expected = (KERNEL.backward(q=q, k=k, v=v, **each) for each in (strided, dense))
    assert all(torch.equal(x, y) and x.any() for x, y in zip(found, expected, strict=True))


def refuses(words: str, call: Callable[[], Any], name: str = "q") -> None:
    with pytest.raises(attngen.ArgumentError, match=f"argument {name}: .*{words}"):
        call()


@pytest.mark.parametrize("target", ["simulator", "sm_90a"])
def test_forward_derivatives_are_refused(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tangent is never lost in silence: neither of inputs that also require grad, nor of those that do not."""
    kernel = WARPS.kernel(target)
    if target == "sm_90a":
        Recorded(monkeypatch, kernel)
    (q, k, v, _), _ = CASE.inputs_on("cpu")
    kernel(q, k, v)
    with forward_ad.dual_level():
        for x in (q, q.clone().requires_grad_()):
            dual = forward_ad.make_dual(x, torch.ones_like(q))
            refuses("forward derivative", lambda dual=dual: kernel(dual, k, v))


@pytest.mark.parametrize("target", ["simulator", "sm_90a"])
def test_forward_and_second_derivatives_of_torch_func_are_refused(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, of a kernel that has a backward pass too."""
    kernel = WARPS.kernel(target)
    if target == "sm_90a":
        Recorded(monkeypatch, kernel)
    (q, k, v, _), _ = CASE.inputs_on("cpu")

    def loss(x: torch.Tensor) -> torch.Tensor:
        return kernel(x, k, v).float().sum()

    refuses("torch.func.jvp.*no forward derivative", lambda: torch.func.jvp(loss, (q,), (q,)))
    refuses("torch.func.jvp.*no forward derivative", lambda: torch.func.hessian(loss)(q))

    def slope(x: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(loss)(x).float().sum()

    refuses("no second derivatives", lambda: torch.func.grad(slope)(q), "create_graph")


def test_a_backward_pass_is_not_recorded() -> None:
    """Its gradients have none themselves: whoever would differentiate them is told."""
    given = good()
    for name in ("dout", "q", "out", "dlse"):
        changed = given | {name: given[name].clone().requires_grad_()}
        refuses("no second derivatives", lambda changed=changed: KERNEL.backward(**changed), name)
        with torch.no_grad():
            KERNEL.backward(**changed)
