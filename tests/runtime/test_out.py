"""`out=`: what cannot be written to is refused before anything runs. Numbers of a call that are too large are named."""

import mmap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import attngen
from attngen.api import resolve_arch
from attngen.errors import ArgumentError, SpecError
from attngen.spec import load

SHAPE = (1, 4, 2, 8)
SPEC = {
    "target": "simulator",
    "problem": {"head_dim": 8},
    "precision": {"inputs": "f32"},
    "scalars": {"n": "i32 = 4", "cap": "f32 = 30.0", "on": "bool = true"},
    "tensors": {"bias": "f32[seqlen_q, num_heads_q, 8]"},
    "mask": "on and kv_idx < n + 100",
    "score": "softcap(score, cap) + bias[q_idx, h, 0]",
}


def from_read_only_file(path: Path) -> torch.Tensor:
    numbers = numpy.zeros(SHAPE, dtype=numpy.float32)
    numbers.tofile(path)
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once that it cannot tell
        return torch.from_numpy(numpy.frombuffer(pages, numpy.float32).reshape(SHAPE))


def of_inference() -> torch.Tensor:
    with torch.inference_mode():
        return torch.empty(SHAPE)


def freed(left: int) -> torch.Tensor:
    out = torch.empty(SHAPE)
    out.untyped_storage().resize_(left)
    return out


NUMBERS: dict[str, Any] = {  # by name, since pytest would write the values out
    "a long text": "9" * 5000,
    "no number": float("nan"),
    "in a list": [10**5000],
    "of 400 digits": 10**400,
    "negative": -(10**400),
    "of 5000 digits": 10**5000,
}
OUTS: dict[str, Callable[[Path, dict[str, Any]], object]] = {
    "only be read": lambda path, call: from_read_only_file(path / "file"),
    "inference tensor": lambda path, call: of_inference(),
    "without memory": lambda path, call: freed(left=0),
    "freed": lambda path, call: freed(left=16),
    "negates": lambda path, call: torch._neg_view(torch.empty(SHAPE)),
    "requires grad": lambda path, call: torch.empty(SHAPE, requires_grad=True),
    "device meta": lambda path, call: torch.empty(SHAPE, device="meta"),
    "strides": lambda path, call: torch.empty(1, 4, 1, 8).expand(SHAPE),
    "overlap itself": lambda path, call: torch.empty(200).as_strided(SHAPE, (64, 4, 8, 1)),
    "shared with q": lambda path, call: call["q"],
    "shared with bias": lambda path, call: call["bias"][None],
    "dtype": lambda path, call: torch.empty(SHAPE, dtype=torch.float64),
    "shape": lambda path, call: torch.empty(1, 4, 2, 9),
    "got list": lambda path, call: [[0.0]],
    "sparse": lambda path, call: torch.empty(SHAPE).to_sparse(),
    "3 dimensions": lambda path, call: torch.empty(SHAPE[1:]),
}


@pytest.mark.parametrize("word", OUTS)
def test_an_out_that_cannot_be_written_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    """The error names `out` and what is wrong with it; the simulator, minutes of work, has not started."""
    monkeypatch.setattr(
        "attngen.simulate.simulator.run_call", lambda *_, **__: pytest.fail("the simulator ran")
    )
    call = {name: torch.randn(SHAPE) for name in "qkv"} | {"bias": torch.randn(SHAPE[1:])}
    with pytest.raises(ArgumentError, match=word) as fault:
        attngen.compile(SPEC)(**call, out=OUTS[word](tmp_path, call))
    assert fault.value.argument == "out"


def test_an_out_that_can_be_written_is() -> None:
    """Memory of torch's, a slice of a packed tensor, and under inference mode a tensor of it hold the result."""
    kernel = attngen.compile(SPEC)
    call = {name: torch.randn(SHAPE) for name in "qkv"} | {"bias": torch.zeros(SHAPE[1:])}
    expected = kernel(**call)
    for out in (
        torch.empty(SHAPE),
        torch.empty(1, 4, 2, 16)[..., :8],
        torch.empty(1, 2, 4, 8).transpose(1, 2),
    ):
        assert kernel(**call, out=out) is out and torch.equal(out, expected)
    with torch.inference_mode():
        out = torch.empty(SHAPE)
        assert torch.equal(kernel(**call, out=out), expected)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", ["n", "cap", "on", "softmax_scale", "layout"])
def test_a_number_of_a_call_that_is_too_large_is_named(name: str, number: str) -> None:
    """Integers that no float holds, that Python does not write out, or texts in their place: one short sentence."""
    call = {name: torch.randn(SHAPE) for name in "qkv"} | {"bias": torch.zeros(SHAPE[1:])}
    with pytest.raises(ArgumentError, match=f"argument {name}: got") as fault:
        attngen.compile(SPEC)(**call, **{name: NUMBERS[number]})
    assert len(str(fault.value)) < 300


def test_an_infinite_scalar_is_one() -> None:
    """Of f32, infinity is a value like any other."""
    call = {name: torch.randn(SHAPE) for name in "qkv"} | {"bias": torch.zeros(SHAPE[1:])}
    kernel = attngen.compile({**SPEC, "score": "bias[q_idx, h, 0] + where(cap > 1e38, 0.0, score)"})
    assert torch.equal(kernel(**call, cap=float("inf")), kernel(**call, cap=2e38))


@pytest.mark.parametrize(
    "arch", [5, 0, b"sm_80", ["sm_80"], NUMBERS, 1.5], ids=lambda arch: type(arch).__name__
)
def test_an_arch_that_is_no_name_is_an_argument(arch: Any) -> None:
    """Neither a crash nor, where Python takes it for nothing, the spec's target."""
    with pytest.raises(ArgumentError, match="argument arch: got"):
        resolve_arch(load(SPEC), arch)


PATHS = ("problem.head_dim", "tile.block_n", "schedule.stages", "precision.seed", "name", "mask", "scalars.n")


@pytest.mark.parametrize("path", [*PATHS, "check", "nope"])
def test_a_number_of_a_spec_that_python_does_not_write_out_is_named(path: str) -> None:
    """In a dict and as a replacement: an error of the spec that names the key, in short lines."""
    number = 10**5000
    for change in (
        lambda: load(SPEC).replace({path: number}),
        lambda: load({**SPEC, path.split(".")[0]: number}),
    ):
        with pytest.raises(SpecError, match=path.split(".")[0]) as fault:
            change()
        assert max(map(len, str(fault.value).splitlines())) < 300
