"""The text of kernels of an e4m3 cache, run by g++: fragments, conversions, scales and the order of columns."""

from typing import Any

import pytest
import torch

import attngen
from attngen.dtypes import F16, torch_dtype
from tests.emit.warps_on_cpu import run_text
from tests.simulate.cache_calls import CacheCall


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one multiprocessor."""
    monkeypatch.setattr("attngen.runtime.launch.sms_of", lambda arch, device: 1)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False, raising=False)


def case(
    head_dim: Any, inputs: str, scales: str, *, queries: str = "dense", keys: str = "paged", **more: Any
) -> Any:
    """A spec of a cache."""
    return {
        "problem": {"head_dim": head_dim, "queries": queries, "keys": keys},
        "precision": {"inputs": inputs, "cache": "e4m3", "scales": scales},
        "mask": "causal",
        **more,
    }


WALK = "causal and kv_idx % 5 != 3"  # which hides keys from every query
CASES = {
    "a head's scales": case(64, "bf16", "per_head"),
    "odd chunks of columns": case({"qk": 80, "v": 48}, "f16", "per_token", split="auto"),
    "pages": case(32, "bf16", "per_page", split={"keys": 64}, mask=WALK),
    "ragged queries": case(128, "bf16", "per_token", queries="ragged", split="auto"),
    "padded keys": case(
        64, "bf16", "per_token", keys="padded", schedule={"kind": "fa2", "stages": 1}, mask=WALK
    ),
    "ragged keys": case(48, "f16", "per_token", queries="ragged", keys="ragged"),
    "wide heads": case(256, "bf16", "per_tensor", split="auto"),
    "dense": case(96, "bf16", "per_token", keys="dense"),
}
ALWAYS = ("a head's scales", "odd chunks of columns", "pages")


@pytest.mark.parametrize(
    "name", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.exhaustive) for name in CASES]
)
def test_the_text_does_what_the_simulator_does(name: str) -> None:
    """To the order in which a product is summed, also with a negative scale; nothing behind an end reaches anything."""
    kernel = attngen.compile(CASES[name], arch="sm_90a")
    call = CacheCall.drawn(kernel.spec, [90, 0, 17], [3, 2, 2] if "ragged" not in name else [5, 0, 3])
    unit = torch.finfo(torch_dtype(kernel.plan.output)).eps
    for scale in (0.125, -0.25):
        found = run_text(kernel, *call.tensors, scale=scale, **call.passed)
        out, lse = kernel(*call.tensors, scale, return_lse=True, **call.passed)
        largest = out.abs().max().item()
        torch.testing.assert_close(found[0], out, rtol=0, atol=2 * largest * max(unit, F16.epsilon))
        torch.testing.assert_close(found[1], lse, rtol=1e-5, atol=1e-5)
