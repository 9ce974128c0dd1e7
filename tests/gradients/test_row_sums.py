"""The sheet that adds rows up to the gradient of a declared tensor: its text, run by g++, and its meaning in torch."""

import ctypes
from dataclasses import replace

import pytest
import torch

from attngen.emit import emit_module
from attngen.plan import BlockTables, SumRows, evaluate_formula
from attngen.runtime import DiskCache, disassemble
from attngen.simulate.simulated_sheets import sum_rows
from attngen.simulate.visits import Declared, Sizes
from tests.emit.sass import done_before_waiting
from tests.gradients.declared_cases import HEADS, KEYS, QUERIES, TABLES, DeclaredCase
from tests.quantize.on_cpu import CpuKernels

C_TYPES = {"pointer": ctypes.c_void_p, "i64": ctypes.c_int64, "i32": ctypes.c_int32}
CASES = (*KEYS, *QUERIES, *HEADS[:3], *TABLES)


def of_f32(case: DeclaredCase) -> DeclaredCase:
    """The case with tensors of f32: g++ knows no conversion to 16 bits."""
    tensors = {name: (f"f32[{text.partition('[')[2]}", shape) for name, (text, shape) in case.tensors.items()}
    return replace(case, tensors=tensors)


def sheet_of(case: DeclaredCase) -> SumRows:
    """The first of a case's kernel for sm_90a."""
    return next(each for each in case.kernel("sm_90a").call.kernels if isinstance(each, SumRows))


def sums_and_gradient(of: SumRows, case: DeclaredCase) -> tuple[dict[str, int], torch.Tensor, torch.Tensor]:
    """Sizes of a call, sums that the sheet finds, whole numbers, and memory for the gradient: NaN."""
    (rows, keys), (heads, heads_kv) = case.lengths, case.heads
    sizes = {
        "batch": case.batch, "seqlen_q": rows, "seqlen_k": keys, "num_heads_q": heads, "num_heads_kv": heads_kv,
        "group": heads // heads_kv,
    }  # fmt: skip
    shape = (case.batch, heads, keys if of.site.owner == "key" else rows)
    if isinstance(of.sums, BlockTables):
        shape = (case.batch, heads, -(-rows // of.sums.block_m), of.sums.entries)
    found = torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(3)).float()
    _, declared = case.inputs_on("cpu")
    return sizes, found, torch.full_like(declared[of.site.name], torch.nan)


def by_torch(of: SumRows, sizes: dict[str, int], found: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    call = Sizes.of({**sizes, "num_sms": 2}, Declared())
    (gradient,) = of.writes
    return sum_rows(of, {of.sums.name: found, gradient: like}, call)[gradient]


@pytest.mark.matrix(most=5)
@pytest.mark.parametrize("case", [*map(of_f32, CASES)], ids=str)
def test_text_and_torch_function_agree_on_whole_numbers(case: DeclaredCase) -> None:
    """Each element, clamped and broadcast dimensions among them, is the sum of the rows that read it: written once."""
    of = sheet_of(case)
    sizes, found, gradient = sums_and_gradient(of, case)
    expected = by_torch(of, sizes, found, gradient)
    carried: dict[str, int] = {**sizes, f"{of.sums}.ptr": found.data_ptr()}
    (value,) = of.writes
    carried |= {f"{value}.ptr": gradient.data_ptr()}
    carried |= {f"{value}.stride_{i}": step for i, step in enumerate(gradient.stride())}
    carried |= {
        str(size): extent
        for size, extent in zip(of.sizes, gradient.shape, strict=True)
        if isinstance(size, str)
    }

    class Params(ctypes.Structure):
        _fields_ = [(param.name, C_TYPES[param.ctype]) for param in of.params]

    params = Params(*(carried[param.value] for param in of.params))
    kernel = CpuKernels(emit_module((of,))).function(of.name, 0, False)
    kernel.run(ctypes.byref(params), evaluate_formula(of.grid, carried), of.threads)
    assert torch.equal(gradient, expected) and gradient.count_nonzero() > gradient.numel() // 2


def test_what_no_row_reads_is_0_and_what_many_read_is_their_sum() -> None:
    """An index is clamped: of 50 elements by key the last is read by 81 of 130 keys; of 100 by query 30 by none."""
    by_key, by_query = map(of_f32, (KEYS[2], QUERIES[1]))
    of = sheet_of(by_key)
    sizes, found, gradient = sums_and_gradient(of, by_key)
    made = by_torch(of, sizes, found, gradient)
    assert made[49] == found[:, :, 49:].sum() and made[48] == found[:, :, 48].sum()
    of = sheet_of(by_query)
    made = by_torch(of, *sums_and_gradient(of, by_query))
    assert not made[:, 70:].any() and made[:, :70].all(dim=0).any()


@pytest.mark.usefixtures("nvdisasm")
@pytest.mark.parametrize("case", [KEYS[1], HEADS[0], HEADS[3], TABLES[1]], ids=str)
def test_the_text_compiles_without_spills(case: DeclaredCase) -> None:
    """Nothing spills, and nothing is read before the kernel has waited for the one that makes the sums."""
    of = sheet_of(case)
    assert emit_module((of,)) == emit_module((sheet_of(case),))
    compiled = DiskCache().get(emit_module((of,)), "sm_90a")
    (used,) = compiled.resources
    assert compiled.warnings == () and (used.spill_stores, used.spill_loads, used.stack_bytes) == (0, 0, 0)
    assert not done_before_waiting(disassemble(compiled.cubin))
