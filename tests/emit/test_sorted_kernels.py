"""Masks on sorted tensors: the text of the kernel that finds boundaries, run by g++, and what NVRTC makes of all."""

import ctypes
from functools import cache
from typing import Any

import pytest
import torch

import attngen
from attngen.emit import emit_module
from attngen.expr import find_boundaries
from attngen.plan import FindBoundaries, evaluate_formula
from tests.emit.sass import done_before_waiting, hot_loop
from tests.quantize.on_cpu import CpuKernels

C_TYPES = {"pointer": ctypes.c_void_p, "i64": ctypes.c_int64, "i32": ctypes.c_int32, "f32": ctypes.c_float}
TENSORS = {
    "doc": "i32[batch, seqlen_k] sorted",
    "kinds": "u8[num_heads_q, seqlen_q] sorted",
    "slopes": "f32[num_heads_q]",
}
SCALARS = {"reach": "i32 = 2", "cap": "f32 = 30.0"}
MASKS = (
    "causal and document(doc)",
    "doc[b, kv_idx] == kinds[h, q_idx] + reach and doc[b, kv_idx] > -3",
    "max(doc[b, kv_idx], 0) <= kinds[h, q_idx] // 2 + h_kv",
)


def spec_of(mask: str, score: str = "score", **fields: Any) -> dict[str, Any]:
    read = f"{mask} {score}"
    return {
        "problem": {"head_dim": 64},
        "tensors": {name: text for name, text in TENSORS.items() if name in read},
        "scalars": {name: text for name, text in SCALARS.items() if name in read},
        "mask": mask,
        "score": score,
        "gradients": ["q", "k", "v"],
        **fields,
    }


@cache
def finders(mask: str) -> tuple[FindBoundaries, ...]:
    call = attngen.compile(spec_of(mask), arch="sm_80").call
    return tuple(kernel for kernel in call.kernels if isinstance(kernel, FindBoundaries))


def run_on_cpu(
    of: FindBoundaries, sizes: dict[str, int], tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What the emitted text finds; what it does not write stays -1."""
    extents = {
        "b": "batch",
        "h": "num_heads_q",
        "h_kv": "num_heads_kv",
        "q_idx": "seqlen_q",
        "kv_idx": "seqlen_k",
    }
    made = {
        each.name: torch.full([sizes[extents[index.name]] for index in each.indices], -1, dtype=torch.int32)
        for each in of.boundaries
    }
    carried: dict[str, Any] = {**sizes, "scalar.reach": 2}
    carried |= {f"size.{name}": size for name, size in sizes.items()}
    for name, x in {f"tensor.{name}": x for name, x in tensors.items()}.items():
        carried |= {f"{name}.ptr": x.data_ptr()} | {
            f"{name}.stride_{i}": step for i, step in enumerate(x.stride())
        }
    carried |= {f"{name}.ptr": x.data_ptr() for name, x in made.items()}

    class Params(ctypes.Structure):
        _fields_ = [(param.name, C_TYPES[param.ctype]) for param in of.params]

    params = Params(*(carried[param.value] for param in of.params))
    kernels = CpuKernels(emit_module((of,)))
    grid = evaluate_formula(of.grid, sizes)
    kernels.function(of.name, 0, False).run(ctypes.byref(params), grid, of.threads)
    return made


@pytest.mark.matrix(most=2)
@pytest.mark.parametrize("mask", MASKS)
def test_the_text_finds_what_torch_finds(mask: str) -> None:
    """To the element, of tensors with strides, more elements than a block has threads, and of values that fall too."""
    for of in finders(mask):
        assert of.boundaries
        for seqlen_q, seqlen_k in ((7, 7), (1, 130), (150, 40), (3, 0)):
            sizes = {
                "batch": 2, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k,
                "num_heads_q": 4, "num_heads_kv": 2, "group": 2,
            }  # fmt: skip
            random = torch.Generator().manual_seed(seqlen_q)
            doc = torch.randint(-4, 5, (2, 2 * seqlen_k), generator=random).int()
            kinds = torch.randint(0, 4, (4, seqlen_q), generator=random).to(torch.uint8)
            for are_sorted in (True, False):
                if are_sorted:
                    doc, kinds = doc.sort()[0], kinds.sort()[0]
                else:
                    doc, kinds = doc.flip(-1).contiguous(), kinds.flip(-1).contiguous()
                tensors = {name: x for name, x in (("doc", doc[:, ::2]), ("kinds", kinds)) if name in mask}
                found = run_on_cpu(of, sizes, tensors)
                expected = find_boundaries(of.boundaries, sizes, {"reach": 2}, tensors)
                for name, x in expected.items():
                    assert torch.equal(found[name], x)


def test_nothing_is_launched_without_heads() -> None:
    """An empty batch, or no heads, asks for no boundary; neither do lengths of 0 divide anything."""
    (keys, rows) = finders(MASKS[0])
    sizes = {"batch": 2, "seqlen_q": 5, "seqlen_k": 5, "num_heads_q": 1, "num_heads_kv": 1}
    assert evaluate_formula(keys.grid, sizes) == evaluate_formula(rows.grid, sizes) == 1
    for nothing in ("batch", "num_heads_q", "num_heads_kv"):
        assert evaluate_formula(keys.grid, {**sizes, nothing: 0}) == 0
    assert evaluate_formula(keys.grid, {**sizes, "seqlen_q": 0}) == 0
    assert evaluate_formula(rows.grid, {**sizes, "seqlen_k": 0}) == 0


@pytest.mark.matrix(classes=lambda arch, mask, score, head_dim: {arch, mask, score, head_dim}, most=2)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("arch", "mask", "score"),
    [
        ("sm_90a", "document(doc)", "score"),
        ("sm_90a", "causal and document(doc)", "softcap(score, cap) + alibi(slopes)"),
        ("sm_90a", "causal and window(500, 0) and document(doc)", "score"),
        ("sm_80", "causal and document(doc)", "score"),
        ("sm_80", "document(doc)", "softcap(score, cap) + alibi(slopes)"),
    ],
)
def test_both_passes_compile_without_spills(arch: str, mask: str, score: str, head_dim: int) -> None:
    """Every kernel, with the tiles that auto picks."""
    kernel = attngen.compile(spec_of(mask, score, problem={"head_dim": head_dim}), arch=arch)
    kernel.compile()
    for module in kernel.modules.values():
        for used in module.compiled.resources:
            assert used.spill_stores == used.spill_loads == used.stack_bytes == 0, used
        assert not module.compiled.warnings


@pytest.mark.usefixtures("nvdisasm")
def test_looked_up_bounds_cost_warpgroups_nothing() -> None:
    """Descriptors stay in uniform registers in every loop over blocks, and nothing is read ahead of the wait."""
    kernel = attngen.compile(spec_of("causal and document(doc)"), arch="sm_90a")
    kernel.compile()
    for name, module in kernel.modules.items():
        sass = module.sass()
        assert not done_before_waiting(sass), name
        if "HGMMA" in sass:
            assert hot_loop(sass)["R2UR"] == 0, name
