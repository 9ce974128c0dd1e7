"""The simulator on the grid that the GPU tests run, lengths capped, and a format for each mask."""

import pytest

import attngen
from tests.check.length_grid import HEAD_DIMS, INPUTS, LONGEST_ON_CPU, MASKS, complaints, points

ARCHS = {"fa2": "sm_80", "serial": "sm_80", "warp_specialized": "sm_90a", "pingpong": "sm_90a"}
"""Whose tiles each schedule has here."""


@pytest.mark.matrix
@pytest.mark.parametrize("dims", HEAD_DIMS, ids=lambda dims: f"d{dims[0]}x{dims[1]}")
@pytest.mark.parametrize(("mask", "inputs"), [*zip(MASKS, INPUTS, strict=True)])
@pytest.mark.parametrize("kind", ARCHS)
def test_error_stays_in_its_bound(kind: str, mask: str, inputs: str, dims: tuple[int, int]) -> None:
    """The plan for a GPU: every length with MHA, GQA and MQA is within the bound, every layout gives the same bits.

    Each mask has one format; on a GPU each has both.
    """
    grid = list(points(dims, inputs, mask, LONGEST_ON_CPU))
    kernel = attngen.compile(grid[0].spec(kind), arch=ARCHS[kind])
    assert not (wrong := complaints(kernel, grid)), wrong
