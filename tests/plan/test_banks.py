"""Shared memory without bank conflicts, counted from the plan's layout for every access pattern of the device code."""

from collections import Counter

import pytest

import attngen
from attngen.arch import ARCHS
from attngen.plan import Buffer
from tests.plans import kernel_plan

HEAD_DIMS = [(32, 32), (40, 40), (64, 64), (72, 72), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)]


def conflicts(addresses: list[int], width: int) -> int:
    """Extra passes of one access: lanes are served 128 bytes at a time, each bank of 4 bytes once."""
    lanes = 128 // width
    extra = 0
    for first in range(0, len(addresses), lanes):
        words = {word for a in addresses[first : first + lanes] for word in range(a // 4, (a + width) // 4)}
        extra += max(Counter(word % 32 for word in words).values()) - 1
    return extra


def buffers(dims: tuple[int, int], kind: str) -> tuple[Buffer, ...]:
    spec = {"problem": {"head_dim": {"qk": dims[0], "v": dims[1]}}, "schedule": {"kind": kind}}
    return kernel_plan(attngen.load(spec), ARCHS["sm_90a"]).buffers


@pytest.mark.parametrize("dims", HEAD_DIMS, ids=str)
@pytest.mark.parametrize("kind", ["fa2", "serial"])
def test_no_access_has_a_bank_conflict(kind: str, dims: tuple[int, int]) -> None:
    """ldmatrix of A, B and transposed B, stores of O, and the copies in and out: one pass of the banks each."""
    for buffer in buffers(dims, kind):
        at = buffer.swizzle.address
        for chunk in range(0, buffer.pitch_chunks, 2):
            a_like = [at(lane % 16, chunk + lane // 16) for lane in range(32)]
            b_like = [at(lane // 16 * 8 + lane % 8, chunk + lane // 8 % 2) for lane in range(32)]
            assert conflicts(a_like, 16) == conflicts(b_like, 16) == 0
        for chunk in range(buffer.pitch_chunks):
            out = [at(lane // 4, chunk) + lane % 4 * 4 for lane in range(32)]
            assert conflicts(out, 4) == 0
        pitch = buffer.pitch_chunks
        for first in range(0, buffer.rows * pitch, 32):
            copied = [at(index // pitch, index % pitch) for index in range(first, first + 32)]
            assert conflicts(copied, 16) == 0


def test_without_the_swizzle_the_count_finds_conflicts() -> None:
    """The counter can fail: rows of 256 bytes without exchange put eight rows on the same banks."""
    assert conflicts([lane % 16 * 256 for lane in range(32)], 16) > 0
