"""The texts of sheets of the fused backward, run by g++ on tensors."""

import ctypes
from functools import cache
from typing import Any

import torch

from attngen.emit import emit_module
from attngen.plan import FinishSums, PrepareRows, evaluate_formula
from tests.quantize.on_cpu import CpuKernels

C_TYPES = {"pointer": ctypes.c_void_p, "i64": ctypes.c_int64, "i32": ctypes.c_int32, "f32": ctypes.c_float}


@cache
def on_cpu(text: str) -> CpuKernels:
    return CpuKernels(text)


def run_on_cpu(
    sheet: FinishSums | PrepareRows, values: dict[str, torch.Tensor], numbers: dict[str, Any]
) -> None:
    """Run the text of a sheet by g++ on tensors that it reads and writes."""
    carried = dict(numbers)
    for name, x in values.items():
        of_heads = ("batch", "seqlen", "head", "column")[-x.dim() :]
        for axes in (range(x.dim()), of_heads):
            carried |= {f"{name}.stride_{axis}": step for axis, step in zip(axes, x.stride(), strict=False)}
        carried[f"{name}.ptr"] = x.data_ptr()

    class Params(ctypes.Structure):
        _fields_ = [(param.name, C_TYPES[param.ctype]) for param in sheet.params]

    params = Params(*(carried.get(param.value, 0) for param in sheet.params))
    grid = evaluate_formula(sheet.grid, numbers)
    on_cpu(emit_module((sheet,))).function(sheet.name, 0, False).run(
        ctypes.byref(params), grid, sheet.threads
    )


def as_registers(rows: torch.Tensor, sheet: FinishSums) -> torch.Tensor:
    """Rows of sums, each block in the order in which accumulators of m64nNk16 lie in registers.

    Source: PTX ISA, register fragments of wgmma.m64n8k16: accumulator D.
    """
    block, cols, by_rows = sheet.sums.block_m, sheet.sums.cols, sheet.sums.shared_by == "rows"
    own_cols = cols if by_rows else cols // 2
    order = []
    for warpgroup in range(2):
        for warp in range(4):
            for j in range(own_cols // 8):
                for lane in range(32):
                    for e in range(4):
                        row = warp * 16 + lane // 4 + e // 2 * 8 + (64 * warpgroup if by_rows else 0)
                        column = 8 * j + lane % 4 * 2 + e % 2 + (0 if by_rows else own_cols * warpgroup)
                        order.append(row * cols + column)
    blocks = rows.reshape(*rows.shape[:2], -1, block * cols)
    return blocks[..., torch.tensor(order)].reshape(rows.shape).contiguous()
