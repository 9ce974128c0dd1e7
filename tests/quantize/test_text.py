"""The text of the quantisation kernels: what NVRTC makes of it, and that it is the same each time."""

import pytest

from attngen.arch import ARCHS, RESERVED_SMEM_BYTES
from attngen.emit import emit_quantizing
from attngen.plan import Quantizer, quantizing_sheets
from attngen.quantize import SCALE_KINDS, ScaleKind
from attngen.runtime import DiskCache, disassemble
from tests.emit.sass import done_before_waiting

TRANSFORMED = (64, 128, 256)
"""Head dims that have a Hadamard matrix."""
DIMS_AND_SEEDS = [
    (dim, seed) for dim in (16, 80, 128, 192, 256) for seed in ((None, 1) if dim in TRANSFORMED else (None,))
]


def quantizer(dim: int, scales: ScaleKind, seed: int | None, head_dim_v: int | None = None) -> Quantizer:
    return Quantizer("some", ARCHS["sm_90a"], dim, head_dim_v or dim, scales, seed)


def text_of(made: Quantizer) -> str:
    return emit_quantizing(quantizing_sheets(made))


@pytest.mark.usefixtures("nvdisasm")
@pytest.mark.matrix(classes=lambda dim, seed, scales: [("rows", dim, seed), ("scales", scales, seed)], most=5)
@pytest.mark.parametrize("scales", SCALE_KINDS)
@pytest.mark.parametrize(("dim", "seed"), DIMS_AND_SEEDS)
def test_kernels_compile_without_spills(dim: int, seed: int | None, scales: ScaleKind) -> None:
    """Whole in registers, and as many blocks fit a multiprocessor as planned."""
    made = quantizer(dim, scales, seed)
    compiled = DiskCache().get(text_of(made), "sm_90a")
    assert not done_before_waiting(disassemble(compiled.cubin))
    asked = {sheet.name: sheet.smem_bytes for sheet in quantizing_sheets(made)}
    assert {used.name for used in compiled.resources} == asked.keys()
    for used in compiled.resources:
        assert (used.spill_stores, used.spill_loads, used.stack_bytes) == (0, 0, 0), used
        assert made.blocks_per_sm * made.threads * used.registers <= made.arch.registers_per_sm
        smem_bytes = asked[used.name] + used.static_smem_bytes + RESERVED_SMEM_BYTES
        assert made.blocks_per_sm * smem_bytes <= made.arch.smem_bytes_per_sm


def test_many_columns_of_v() -> None:
    """Where V is wider than Q and K a thread holds more of it, and still spills nothing."""
    for scales in SCALE_KINDS:
        for used in DiskCache().get(text_of(quantizer(64, scales, 1, 256)), "sm_90a").resources:
            assert (used.spill_stores, used.stack_bytes) == (0, 0), used


def test_enough_bytes_are_in_flight() -> None:
    """At the usual head dims a multiprocessor holds loads of 32 KB at least, more than its share of the memory needs.

    Of 4.2 TB/s two thirds are read: for a latency of 800 ns 2.2 MB, 17 KB for each of 132 multiprocessors.
    """
    for dim in TRANSFORMED:
        for scales in SCALE_KINDS:
            for seed in (None, 1):
                made = quantizer(dim, scales, seed)
                assert made.blocks_per_sm * 16 * made.staged * made.threads >= 32 * 1024


def test_the_text_is_the_same_each_time() -> None:
    """The same quantizer gives the same bytes, another seed others."""
    made = quantizer(64, "per_block", 1)
    assert text_of(made) == text_of(quantizer(64, "per_block", 1))
    assert text_of(made) != text_of(quantizer(64, "per_block", 2))
