"""The sheet that prepares the rows of a backward pass: what it means, and its text, by NVRTC and run by g++."""

import ctypes
import math
from functools import cache
from itertools import pairwise

import pytest
import torch

import attngen
from attngen.arch import ARCHS
from attngen.dtypes import DTYPES
from attngen.emit import emit_module
from attngen.plan import PADDED_ROWS, PrepareRows, evaluate_formula
from attngen.runtime import DiskCache, disassemble
from attngen.simulate.simulated_sheets import prepare_rows
from attngen.simulate.visits import Sizes
from tests.emit.sass import done_before_waiting
from tests.plans import kernel_plan
from tests.quantize.on_cpu import CpuKernels

Shape = tuple[int, int, int]
"""Batch, seqlen_q, num_heads_q."""
C_TYPES = {"pointer": ctypes.c_void_p, "i64": ctypes.c_int64, "i32": ctypes.c_int32}


@cache
def sheet(head_dim_v: int, formats: str = "bf16", arch: str = "sm_90a") -> PrepareRows:
    """Of inputs of a format, and an output of that or of another: "bf16, f32"."""
    inputs, *output = formats.split(", ")
    problem = {"head_dim": {"qk": 64, "v": head_dim_v}}
    precision = {"inputs": inputs, "output": output[0] if output else "auto"}
    spec = {"problem": problem, "precision": precision, "gradients": ["q", "k", "v"]}
    return PrepareRows(kernel_plan(attngen.load(spec), ARCHS[arch]))


def inputs(shape: Shape, head_dim_v: int, formats: str, with_dlse: bool = True) -> dict[str, torch.Tensor]:
    """O and dO of different strides, rows without keys among the others."""
    batch, rows, heads = shape
    dtype, *_, of_out = (getattr(torch, DTYPES[name].torch_name) for name in 2 * formats.split(", "))
    random = torch.Generator().manual_seed(head_dim_v)
    out = torch.randn(batch, rows, heads, head_dim_v, generator=random).to(of_out)
    dout = torch.randn(batch, heads, rows, head_dim_v + 8, generator=random).to(dtype)
    lse = 30 * torch.randn(batch, heads, rows, generator=random)
    lse.view(-1)[::7], lse.view(-1)[3::11] = -math.inf, math.inf
    values = {"out": out, "dout": dout[..., :head_dim_v].transpose(1, 2), "lse": lse}
    if with_dlse:
        values["dlse"] = torch.randn(rows, heads, batch, generator=random).transpose(0, 2)
        values["dlse"][lse == -math.inf] = math.nan
    return values


def in_fp64(values: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """D, lse in log2 units, and what of D's terms is added up in magnitude."""
    terms = (values["out"].double() * values["dout"].double()).transpose(1, 2)
    delta, size = terms.sum(-1), terms.abs().sum(-1)
    if "dlse" in values:
        delta, size = delta - values["dlse"].double(), size + values["dlse"].double().abs()
    no_keys = values["lse"].isinf()
    lse_log2 = torch.where(no_keys, math.inf, values["lse"].double() / math.log(2))
    return torch.where(no_keys, 0.0, delta), lse_log2, size


def assert_right(found: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> None:
    """As fp64 says but for f32: a rounding for each term of D at most, two for lse in log2 units; 0 and +inf behind."""
    delta, lse_log2, size = in_fp64(values)
    no_keys, unit, rows = values["lse"].isinf(), 2.0**-24, delta.shape[-1]
    for name in ("delta", "lse_log2"):
        assert found[name].dtype == torch.float32 and found[name].is_contiguous()
        assert found[name].shape == (*delta.shape[:2], -(-rows // PADDED_ROWS) * PADDED_ROWS)
    assert (found["delta"][..., rows:] == 0).all() and (found["lse_log2"][..., rows:] == math.inf).all()
    found = {name: x[..., :rows] for name, x in found.items()}
    assert (found["delta"][no_keys] == 0).all() and (found["lse_log2"][no_keys] == math.inf).all()
    seen = ~no_keys
    columns = values["out"].shape[-1]
    assert ((found["delta"].double() - delta).abs()[seen] <= (columns * unit * size)[seen]).all()
    assert ((found["lse_log2"].double() - lse_log2).abs()[seen] <= 2 * unit * lse_log2.abs()[seen]).all()


@cache
def on_cpu(text: str) -> CpuKernels:
    return CpuKernels(text)


def run_on_cpu(of: PrepareRows, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the emitted text makes of values; what it does not write stays NaN."""
    batch, rows, heads, _ = values["out"].shape
    padded = -(-rows // PADDED_ROWS) * PADDED_ROWS
    made = {name: torch.full((batch, heads, padded), math.nan) for name in of.writes}
    sizes = {"batch": batch, "seqlen_q": rows, "num_heads_q": heads}
    carried = dict(sizes)
    for name, x in (values | made).items():
        carried |= {f"{name}.ptr": x.data_ptr()}
        axes = ("batch", "seqlen", "head", "column") if x.dim() == 4 else range(3)
        carried |= {f"{name}.stride_{axis}": step for axis, step in zip(axes, x.stride(), strict=True)}

    class Params(ctypes.Structure):
        _fields_ = [(param.name, C_TYPES[param.ctype]) for param in of.params]

    params = Params(*(carried.get(param.value, 0) for param in of.params))
    grid = evaluate_formula(of.grid, sizes)
    on_cpu(emit_module((of,))).function(of.name, 0, False).run(ctypes.byref(params), grid, of.threads)
    return made


@pytest.mark.matrix(most=5)
@pytest.mark.parametrize("formats", ["bf16", "f16", "bf16, f32"])
@pytest.mark.parametrize("head_dim_v", [32, 40, 128, 192, 256])
def test_text_and_torch_function_say_what_fp64_says(head_dim_v: int, formats: str) -> None:
    """Several batches and heads, rows that do not fill a block, other strides, with and without a gradient of lse."""
    of = sheet(head_dim_v, formats)
    for shape, with_dlse in (((2, of.block_rows + 5, 3), True), ((1, 70, 2), False)):
        values = inputs(shape, head_dim_v, formats, with_dlse)
        torch_says = prepare_rows(of, values, Sizes(*shape[:2], 1, shape[2], shape[2]))
        assert_right(torch_says, values)
        assert_right(run_on_cpu(of, values), values)


def test_rows_that_do_not_start_on_16_bytes() -> None:
    """Their elements are loaded one by one, with the same result to the bit."""
    of = sheet(40)
    values = inputs((2, 33, 3), 40, "bf16")
    aligned = run_on_cpu(of, values)
    for name in ("out", "dout"):
        for skipped, columns in ((1, 48), (0, 41)):
            off = torch.empty(2, 33, 3, columns + skipped, dtype=torch.bfloat16)[..., skipped:][..., :40]
            found = run_on_cpu(of, values | {name: off.copy_(values[name])})
            assert all(torch.equal(found[each], aligned[each]) for each in of.writes)


def test_whole_numbers_are_exact() -> None:
    """Where nothing is rounded the text and the torch function agree to the bit."""
    of = sheet(128)
    values = inputs((1, 50, 2), 128, "bf16")
    for name in ("out", "dout", "dlse"):
        values[name] = values[name].nan_to_num().mul(4).round().clamp(-16, 16)
    expected = prepare_rows(of, values, Sizes(1, 50, 1, 2, 2))
    found = run_on_cpu(of, values)
    assert all(torch.equal(found[name], expected[name]) for name in of.writes)
    assert found["delta"].abs().max() > 100


def test_an_lse_that_overflows_in_log2_units_is_that_of_no_keys() -> None:
    """Its probabilities are 0, where they were NaN; an lse that is NaN stays NaN, and one at the edge is kept."""
    of = sheet(64)
    values = inputs((1, 5, 1), 64, "bf16", with_dlse=False)
    values["lse"] = torch.tensor([[[-3.38e38, 3.38e38, -2.3e38, math.nan, 1.0]]])
    for found in (prepare_rows(of, values, Sizes(1, 5, 1, 1, 1)), run_on_cpu(of, values)):
        lse, delta = found["lse_log2"][0, 0], found["delta"][0, 0]
        assert (lse[:2] == math.inf).all() and (delta[:2] == 0).all()
        assert lse[2].isfinite() and lse[3].isnan() and delta[2:5].count_nonzero() == 3


def test_a_call_without_rows_has_no_blocks() -> None:
    """No batch, no rows or no heads: nothing is launched."""
    for empty in ("batch", "seqlen_q", "num_heads_q"):
        sizes = {"batch": 2, "seqlen_q": 100, "num_heads_q": 3, empty: 0}
        assert evaluate_formula(sheet(64).grid, sizes) == 0


@pytest.mark.matrix(most=3)
@pytest.mark.usefixtures("nvdisasm")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("formats", ["f16", "bf16, f32"])
@pytest.mark.parametrize("head_dim_v", [32, 128, 256])
def test_the_text_compiles_without_spills(head_dim_v: int, formats: str, arch: str) -> None:
    """Whole in registers; all loads of O and dO are under way before the first is used; it waits as others do."""
    of = sheet(head_dim_v, formats, arch)
    compiled = DiskCache().get(emit_module((of,)), arch)
    (used,) = compiled.resources
    assert compiled.warnings == () and used.name == of.name
    assert (used.spill_stores, used.spill_loads, used.stack_bytes) == (0, 0, 0)
    blocks = 7 if "f32" in formats else 8  # an f32 row is half as long again in all
    assert used.registers * blocks * of.threads <= of.arch.registers_per_sm
    sass = disassemble(compiled.cubin).splitlines()
    loads = [number for number, line in enumerate(sass) if "LDG.E.128" in line]
    uses = [number for number, line in enumerate(sass) if "SHFL" in line]
    assert len(loads) == (3 if "f32" in formats else 2) * of.lane_rows and max(loads) < min(uses)
    if of.arch.starts_early:
        assert not done_before_waiting("\n".join(sass))


def test_a_module_of_its_own() -> None:
    """Beside the attention kernel's, the same bytes each time; a struct whose pointers come first."""
    of = sheet(64)
    assert of.name == of.module == f"{of.plan.name}_rows"
    assert emit_module((of,)) == emit_module((PrepareRows(of.plan),))
    types = [param.ctype for param in of.params]
    ranks = [("pointer", "i64", "i32").index(each) for each in types]
    assert all(a <= b for a, b in pairwise(ranks))


def test_rows_2_to_the_30_elements_apart() -> None:
    """Offsets beyond 2^31 elements are those of 64 bits, of O and of dO; most of the memory is never touched."""
    of = sheet(64)
    values = inputs((1, 3, 1), 64, "bf16")
    expected = run_on_cpu(of, values)
    for name in ("out", "dout"):
        far = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided((1, 3, 1, 64), (0, 2**30, 0, 1))
        found = run_on_cpu(of, values | {name: far.copy_(values[name])})
        assert all(torch.equal(found[each], expected[each]) for each in of.writes)
