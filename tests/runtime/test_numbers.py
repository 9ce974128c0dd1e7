"""Numbers of Python, of numpy and of 0-dimensional tensors mean the same to the launcher and to the simulator."""

import ctypes
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attngen
from attngen.bind import softmax_scale_of
from attngen.bind.numbers import scalar_of
from tests.runtime.test_declared import Recorder

SPEC = {
    "problem": {"head_dim": 64},
    "precision": {"inputs": "f16"},
    "mask": "kv_idx < n and (strict or kv_idx % 2 == 0)",
    "score": "score + 1.0 / gain",
    "scalars": {"n": "i32", "gain": "f32", "strict": "bool"},
    "schedule": {"kind": "fa2"},
}
LAUNCHED = attngen.compile(SPEC, arch="sm_90a")
Q = torch.ones(1, 8, 2, 64).half()
PLAIN: dict[str, Any] = {"n": 5, "gain": 0.1, "strict": False}
REALS: tuple[Callable[[float], Any], ...] = (
    np.float64,
    np.longdouble,
    np.array,
    lambda x: torch.tensor(x, dtype=torch.float64),
)
WHOLE: tuple[Callable[[int], Any], ...] = (
    np.int32,
    np.int64,
    lambda n: np.array(n, dtype=np.int64),
    lambda n: torch.tensor(n, dtype=torch.int64),
    lambda n: torch.tensor(n, dtype=torch.int32),
)


def as_f32(x: float) -> float:
    return ctypes.c_float(x).value


@given(st.floats(allow_nan=False, width=32), st.sampled_from((np.float32, np.float64, torch.tensor)))
def test_an_f32_is_itself(x: float, make: Callable[[float], Any]) -> None:
    """Whatever holds it, every f32 comes through as it is, the sign of its zero and subnormal ones too."""
    found = scalar_of("gain", "f32", make(x))
    assert type(found) is float and found == x and math.copysign(1, found) == math.copysign(1, x)


@given(st.floats(allow_nan=False), st.sampled_from((float, *REALS)))
def test_a_real_number_becomes_the_nearest_f32(x: float, make: Callable[[float], Any]) -> None:
    """As a conversion of C rounds, whatever holds the number."""
    assert scalar_of("gain", "f32", make(x)) == as_f32(x)


@given(st.integers(-(2**31) + 1, 2**31 - 1), st.sampled_from((int, *WHOLE)))
def test_an_integer_is_itself(n: int, make: Callable[[int], Any]) -> None:
    """For an i32 and for an f32, which takes integers too."""
    found = scalar_of("n", "i32", make(n))
    assert type(found) is int and found == n
    assert scalar_of("gain", "f32", make(n)) == as_f32(n)


@pytest.mark.parametrize("make", [np.bool_, np.array, torch.tensor, bool])
@pytest.mark.parametrize("value", [True, False])
def test_a_bool_is_a_bool_and_no_number(make: Callable[[bool], Any], value: bool) -> None:
    """A bool is taken for a bool alone, of numpy and of torch as of Python."""
    assert scalar_of("strict", "bool", make(value)) is value
    for type_ in ("i32", "f32"):
        with pytest.raises(attngen.ArgumentError, match=f"got {value}"):
            scalar_of("n", type_, make(value))
    with pytest.raises(attngen.ArgumentError, match=f"argument softmax_scale: got {value}"):
        softmax_scale_of(make(value))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("n", np.float32(5), "got 5.0.*an integer"),
        ("n", torch.tensor(5.0), "got 5.0.*an integer"),
        ("n", np.array([5]), "got array.*an integer"),
        ("n", 2**31, "got 2147483648.*an integer"),
        pytest.param("n", 10**5000, "got an integer of 16,610 bits.*an integer", id="huge"),
        ("strict", np.int64(1), "got 1.*True or False"),
        ("gain", np.float32("nan"), "got nan.*a number"),
        ("gain", np.complex64(1), "a number"),
        ("gain", np.str_("1"), "a number"),
        ("gain", 10**400, "got an integer of 1,329 bits.*a number"),
        ("gain", torch.ones(1), "shape \\(1,\\).*pass gain.item\\(\\)"),
        ("gain", torch.ones(2), "shape \\(2,\\).*a number"),
        ("gain", torch.ones((), device="meta"), "on meta.*waits for its device.*pass gain.item\\(\\)"),
        ("gain", torch.ones((), requires_grad=True), "requires grad.*pass gain.detach\\(\\)"),
        ("gain", torch.tensor(1j), "a number"),
    ],
)
def test_what_is_no_such_number_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: object, words: str
) -> None:
    """By the launcher too, whether it knows the signature or not."""
    recorder = Recorder(monkeypatch, LAUNCHED)
    for _ in range(2):
        with pytest.raises(attngen.ArgumentError, match=f"(?s)argument {name}: .*{words}") as caught:
            recorder.run(Q, Q, Q, **PLAIN | {name: value})
        assert caught.value.argument == name
        recorder.run(Q, Q, Q, **PLAIN)
    assert len(recorder.sent) == 2


@pytest.mark.parametrize(
    "scale",
    [np.float32(0.1), np.float64(0.1), np.int64(1), np.array(0.1), torch.tensor(0.1), torch.tensor(2)],
)
def test_softmax_scale_may_be_numpys_or_torchs(monkeypatch: pytest.MonkeyPatch, scale: Any) -> None:
    """The launcher sends, and the simulator computes with, the number that it is."""
    recorder = Recorder(monkeypatch, LAUNCHED)
    for given_scale in (scale, float(scale)):
        recorder.run(Q, Q, Q, softmax_scale=given_scale, **PLAIN)
    (*_, first), (*_, second) = recorder.sent
    assert first["softmax_scale"] == second["softmax_scale"] == as_f32(float(scale))
    q = torch.randn(1, 8, 2, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        *(attngen.attention(q, q, q, softmax_scale=x) for x in (scale, float(scale)))  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    "scale", [torch.tensor([0.1]), torch.tensor(0.1, requires_grad=True), np.array([0.1]), 10**400]
)
def test_a_softmax_scale_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch, scale: object) -> None:
    """One of which a gradient is wanted too."""
    recorder = Recorder(monkeypatch, LAUNCHED)
    for call in (
        lambda: recorder.run(Q, Q, Q, softmax_scale=scale, **PLAIN),  # type: ignore[arg-type]
        lambda: attngen.attention(Q, Q, Q, softmax_scale=scale),
    ):
        with pytest.raises(attngen.ArgumentError, match="argument softmax_scale"):
            call()


def test_a_tensor_is_read_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is written to between calls is another number, although it is the same tensor."""
    recorder = Recorder(monkeypatch, LAUNCHED)
    scale, n = torch.tensor(0.5), torch.tensor(3)
    for _ in range(3):
        recorder.run(Q, Q, Q, softmax_scale=scale, **PLAIN | {"n": n})  # type: ignore[arg-type]
        scale.mul_(2)
        n.add_(1)
    sent = [(fields["softmax_scale"], fields["scalar.n"]) for *_, fields in recorder.sent]
    assert sent == [(0.5, 3), (1.0, 4), (2.0, 5)]


def test_zeros_of_both_signs_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered of 0.0 is not sent for -0.0, whose reciprocal is the other infinity."""
    recorder = Recorder(monkeypatch, LAUNCHED)
    for gain in (0.0, -0.0, 0.0):
        recorder.run(Q, Q, Q, **PLAIN | {"gain": gain})
    assert [math.copysign(1, fields["scalar.gain"]) for *_, fields in recorder.sent] == [1, -1, 1]
