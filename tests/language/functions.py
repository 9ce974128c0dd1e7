"""What the functions that CUDA approximates may be off by, and how far they are off, over all exponents of f32.

Sources: of the exact ones CUDA C++ Programming Guide, "Mathematical Functions", table of single precision with maximum
ulp error; of the approximate ones PTX ISA, `ex2.approx`, `lg2.approx`, `rcp.approx`, `sqrt.approx`, and
the guide's `__fdividef`. What is made of several of these has the sum of their errors.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attngen.expr import NO_DECLARATIONS, Expr, parse_score
from tests.language.probe import INDICES, Probe, as_f32, parameters, plan_that_reads_all, sample_fields
from tests.language.probe_sources import PROBE_THREADS, elementwise_source

STEP = 1021
"""Every so many of the bit patterns of f32 is tried: 4.2 million, 8,000 to a power of two."""
_SMALLEST_NORMAL = 2.0**-126
_BEYOND = 2.0**128  # what stands for an infinity where errors are measured


@dataclass(frozen=True)
class Bound:
    """How far from the true value a function may be: the sum of the parts.

    Attributes:
        of: the function in f64.
        ulps: units in the last place of the true value, as f32; half of one more is its rounding.
        relative: times the true value.
        by_argument: times the true value and the argument.
        absolute: where the true value is near 0.
        flushes: a subnormal argument is taken for 0.
        magnitudes: of the arguments for which all this is said.
    """

    of: Callable[[Tensor], Tensor]
    ulps: float = 0.0
    relative: float = 0.0
    by_argument: float = 0.0
    absolute: float = 0.0
    flushes: bool = False
    magnitudes: tuple[float, float] = (0.0, math.inf)

    def allowed(self, x: Tensor, right: Tensor) -> Tensor:
        """How far, for arguments and true values in f64."""
        size = right.abs()
        relative = self.relative + self.by_argument * x.abs()
        return self.absolute + self.ulps * unit(right) + torch.where(relative > 0, relative * size, 0.0)


EXACT: Mapping[str, Bound] = {
    "exp": Bound(torch.exp, ulps=2.5),
    "exp2": Bound(torch.exp2, ulps=2.5),
    "log": Bound(torch.log, ulps=1.5),
    "log2": Bound(torch.log2, ulps=1.5),
    "tanh": Bound(torch.tanh, ulps=2.5),
    "sin": Bound(torch.sin, ulps=2.5),
    "cos": Bound(torch.cos, ulps=2.5),
    # 2.5 of expf, half of the sum and half of the quotient, doubled where 1 / (1 + e) is just below a power of two;
    # below -88 e is infinite.
    "sigmoid": Bound(torch.sigmoid, ulps=7.0, absolute=2.0**-127),
}
"""Functions as a mask or an index has them."""

_ROUNDING = 2.0**-24
FAST: Mapping[str, Bound] = {
    "exp2": Bound(torch.exp2, relative=2.0**-22, absolute=_SMALLEST_NORMAL, flushes=True),
    # The product with log2(e) is rounded, and log2(e) is: both in proportion to the argument.
    "exp": Bound(torch.exp, relative=2.0**-22, by_argument=2.0**-23, absolute=_SMALLEST_NORMAL, flushes=True),
    "log2": Bound(torch.log2, relative=2.0**-22, absolute=2.0**-22, flushes=True),
    "log": Bound(torch.log, relative=2.0**-22 + 2 * _ROUNDING, absolute=2.0**-22, flushes=True),
    # Near 0 a polynomial, 2^-19.4 off relatively. Beyond, 1 - 2 / (1 + e^2x): the quotient is at most 2, and off by a
    # few roundings and by what e is off by.
    "tanh": Bound(torch.tanh, absolute=2.0**-20),
    "sigmoid": Bound(
        torch.sigmoid, relative=2.0**-21, by_argument=2.0**-23, absolute=_SMALLEST_NORMAL, flushes=True
    ),
    "sqrt": Bound(torch.sqrt, relative=2.0**-23 + _ROUNDING, flushes=True),
    "1 /": Bound(torch.reciprocal, ulps=2.5, absolute=_SMALLEST_NORMAL, magnitudes=(2.0**-126, 2.0**126)),
    "sin": EXACT["sin"],
    "cos": EXACT["cos"],
}
"""Functions as a score has them."""


@dataclass(frozen=True)
class Measured:
    """The largest error of a function.

    Attributes:
        relative: largest error by the true value, where that is a normal number.
        ulps: largest error in units in the last place of the true value, likewise.
        absolute: largest error, likewise.
        worst: the argument whose error is largest against what is allowed.
        excess: how much it is over what is allowed, as a fraction of that; not above 0 where the bound holds.
    """

    name: str
    relative: float
    ulps: float
    absolute: float
    worst: float
    excess: float

    @property
    def ok(self) -> bool:
        """Whether the stated bound holds."""
        return self.excess <= 0

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "NOT WITHIN ITS BOUND"
        return (
            f"{self.name}: {verdict}, largest relative error {self.relative:.3g}, {self.ulps:.2f} ulp, "
            f"absolute {self.absolute:.3g}, nearest to the bound at {self.worst!r}"
        )


def unit(right: Tensor) -> Tensor:
    """A unit in the last place of f32 at values in f64."""
    _, exponent = torch.frexp(right.clamp(-_BEYOND, _BEYOND))
    return torch.ldexp(torch.ones_like(right), exponent.clamp(min=-125) - 24)


def excess(bound: Bound, x: Tensor, got: Tensor) -> Tensor:
    """How much each value is over what is allowed, as a fraction of that; infinite where only one is NaN."""
    taken, right = truth(bound, x)
    allowed = bound.allowed(taken.nan_to_num(0.0, 0.0, 0.0), right.nan_to_num(0.0, _BEYOND, -_BEYOND))
    over = _error(got, right) / allowed - 1
    same = (got.double() == right) | (got.isnan() & right.isnan())
    least, greatest = bound.magnitudes
    same |= (taken.abs() < least) | (taken.abs() > greatest)
    return torch.where(same, -1.0, over.nan_to_num(torch.inf, torch.inf))


def truth(bound: Bound, x: Tensor) -> tuple[Tensor, Tensor]:
    """The arguments as the function takes them and the true values, in f64."""
    taken = x.double()
    if bound.flushes:
        taken = torch.where(taken.abs() < _SMALLEST_NORMAL, 0.0 * taken, taken)
    return taken, bound.of(taken)


def _error(got: Tensor, right: Tensor) -> Tensor:
    """Distances in which an infinity is 2^128; NaN where one is NaN."""
    return (got.double().clamp(-_BEYOND, _BEYOND) - right.clamp(-_BEYOND, _BEYOND)).abs()


def measure(name: str, bound: Bound, x: Tensor, got: Tensor) -> Measured:
    """The largest errors of a function over a sample."""
    _, right = truth(bound, x)
    error, over = _error(got, right), excess(bound, x, got)
    least, greatest = bound.magnitudes
    is_normal = right.isfinite() & (right.abs() >= _SMALLEST_NORMAL) & got.isfinite()
    is_normal &= (x.abs() >= least) & (x.abs() <= greatest)
    error_of_normal, normal = error[is_normal], right[is_normal]
    at = int(over.argmax())
    return Measured(
        name,
        float((error_of_normal / normal.abs()).max()),
        float((error_of_normal / unit(normal)).max()),
        float(error_of_normal.max()),
        float(x[at]),
        float(over[at]),
    )


def every_exponent(step: int = STEP) -> Tensor:
    """f32 of all exponents and both signs, NaN and infinities among them."""
    bits = torch.arange(0, 2**32, step)
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)


def calls(bounds: Mapping[str, Bound]) -> dict[str, Expr]:
    """The functions of `score`, by name."""
    return {name: parse_score(f"{name} score" if name.endswith("/") else f"{name}(score)") for name in bounds}


def source_of_functions(target: str, exact: bool) -> tuple[str, Any]:
    """The file of a kernel for each function, and its plan."""
    plan = plan_that_reads_all(NO_DECLARATIONS, target)
    exprs = calls(EXACT if exact else FAST).values()
    kernels = {f"function_{place}": (expr,) for place, expr in enumerate(exprs)}
    return elementwise_source(plan, kernels, exact), plan


def measure_functions(target: str, exact: bool, device: str = "cuda", step: int = STEP) -> list[Measured]:
    """The largest error of every function on a GPU."""
    source, plan = source_of_functions(target, exact)
    probe = Probe(source, target, device)
    bounds = EXACT if exact else FAST
    x = every_exponent(step)
    count = len(x)
    zeros = torch.zeros(count, dtype=torch.int32, device=probe.device)
    samples = dict.fromkeys(INDICES, zeros)
    samples = samples | {"score": x.to(probe.device)}
    found = torch.zeros(len(bounds), count, dtype=torch.int64, device=probe.device)
    fields = parameters(plan, {}, {}, {})
    for place in range(len(bounds)):
        probe.run(f"function_{place}", -(-count // PROBE_THREADS), fields, sample_fields(samples, found))
    rows = as_f32(found.cpu())
    return [measure(name, bound, x, got) for (name, bound), got in zip(bounds.items(), rows, strict=True)]
