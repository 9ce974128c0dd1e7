"""What is emitted for keys that a mask hides from every query, and what NVRTC makes of it."""

import re
from typing import Any

import pytest

import attngen
from attngen.emit import emit
from tests.emit.sass import hot_loop

TENSORS = {"pad": "bool[batch, seqlen_k]", "lens": "i32[batch]"}
PADDED, SHORTER, EVERY_THIRD = "causal and pad[b, kv_idx]", "causal and kv_idx < lens[b]", "kv_idx % 3 != 0"


def kernel_of(arch: str, kind: str, mask: str, head_dim: int = 128, **fields: Any) -> attngen.Kernel:
    spec = {
        "problem": {"head_dim": head_dim},
        "tensors": {name: text for name, text in TENSORS.items() if f"{name}[" in mask},
        "mask": mask,
        "schedule": {"kind": kind},
    }
    return attngen.compile(spec | fields, arch=arch)


@pytest.mark.parametrize(
    ("arch", "kind"),
    [("sm_80", "serial"), ("sm_80", "fa2"), ("sm_90a", "warp_specialized"), ("sm_90a", "pingpong")],
)
def test_partial_blocks_alone_have_zeros_written(arch: str, kind: str) -> None:
    """Of V; of K where a warp votes on products; of nothing where the mask asks nothing of a key alone."""
    text = emit(kernel_of(arch, kind, PADDED).call.programs[-1])
    assert "is_shown(const Params& params, const Tile& tile, int kv_idx)" in text
    assert [f"zero_hidden_rows<{tile}Tile" in text for tile in "QKV"] == [False, False, True]
    if kind != "serial":  # whose blocks are for many rows
        every = len(re.findall(r"^ *zero_hidden_rows<", text, re.MULTILINE))
        in_partial = re.findall(
            r"if \(visit\.is_partial\) \{\n(?: *mbarrier_wait.*\n)? *zero_hidden_rows<", text
        )
        assert len(in_partial) == every > 0
    capped = emit(kernel_of(arch, kind, PADDED, score="softcap(score, 30.0)").call.programs[-1])
    assert [f"zero_hidden_rows<{tile}Tile" in capped for tile in "QKV"] == [False, True, True]
    for mask in ("causal", "prefix(100)", "kv_idx % 3 != q_idx % 2"):
        assert "is_shown" not in emit(kernel_of(arch, kind, mask).call.programs[-1])


def test_an_end_is_met_in_the_first_block_alone() -> None:
    """Of keys before an end the loops have nothing to ask; of a beginning they have."""
    for mask, count in ((SHORTER, 1), ("causal and kv_idx >= lens[b]", 3)):
        text = emit(kernel_of("sm_90a", "pingpong", mask).call.programs[-1])
        assert len(re.findall(r"^ *zero_hidden_rows<", text, re.MULTILINE)) == count


def test_e4m3_has_nothing_for_it() -> None:
    """A hidden key has a part in the scale of its block, and is a column of V there."""
    for plan in kernel_of("sm_90a", "pingpong", PADDED, precision={"inputs": "e4m3"}).call.programs:
        assert "is_shown" not in emit(plan)


@pytest.mark.matrix(most=2)
@pytest.mark.usefixtures("nvdisasm")
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("arch", "kind", "mask"),
    [
        ("sm_90a", "pingpong", PADDED),
        ("sm_90a", "warp_specialized", EVERY_THIRD),
        ("sm_90a", "pingpong", SHORTER),
        ("sm_80", "fa2", "window(700, 0) and kv_idx < lens[b]"),
        ("sm_80", "fa2", PADDED),
        ("sm_80", "serial", EVERY_THIRD),
    ],
)
def test_kernels_compile_without_spills(arch: str, kind: str, mask: str, head_dim: int) -> None:
    """Descriptors stay in uniform registers, but for those of the widest heads, which have few left."""
    kernel = kernel_of(arch, kind, mask, head_dim)
    module = kernel.modules[kernel.call.programs[-1].module]
    for used in module.compiled.resources:
        assert used.spill_stores == used.spill_loads == used.stack_bytes == 0, used
    assert not module.compiled.warnings
    if head_dim <= 128:
        assert hot_loop(module.sass())["R2UR"] == 0
