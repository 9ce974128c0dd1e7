"""The whole grid of lengths on the emitted kernels, and the judgement's own teeth at full length."""

import pytest
from gpu_kernels import KINDS, Wanted, compile_all, runs_here

from tests.check.length_grid import HEAD_DIMS, INPUTS, MASKS, complaints, points
from tests.check.test_mutants import assert_teeth

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]


@pytest.mark.parametrize("dims", HEAD_DIMS, ids=lambda dims: f"d{dims[0]}x{dims[1]}")
@pytest.mark.parametrize("inputs", INPUTS)
def test_error_stays_in_its_bound(inputs: str, dims: tuple[int, int]) -> None:
    """Every schedule and what auto picks, on every length with MHA, GQA and MQA; every layout gives the same bits.

    One test for all of them, so that they are compiled side by side and the inputs drawn once.
    """
    kinds = ("auto", *filter(runs_here, KINDS))
    every = [Wanted(kind, mask, inputs, dims) for mask in MASKS for kind in kinds]
    wrong = []
    for wanted, kernel in zip(every, compile_all(every), strict=True):
        if found := complaints(kernel, points(dims, inputs, wanted.mask), "cuda"):
            wrong.append(f"{wanted.kind}:\n{found}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("mask", MASKS)
def test_no_mutant_passes(mask: str, inputs: str) -> None:
    """What is nearly right is refused at full length too; at shorter ones `check/test_mutants.py` has every dim."""
    assert_teeth((128, 128), inputs, mask, None, "cuda")
