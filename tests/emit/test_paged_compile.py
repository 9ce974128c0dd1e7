"""The text of kernels whose keys lie in pages, and what NVRTC makes of it. Needs no GPU."""

import re

import pytest

import attngen
from attngen.emit import emit
from tests.emit.test_compiled import assert_compiles_as_planned

pytestmark = pytest.mark.usefixtures("nvdisasm")
MASKS = ("causal", "window(1024, 0)", "causal and (window(128, 0) or sinks(4))")


def paged(
    arch: str, head_dim: int, mask: str = "causal", queries: str = "dense", **more: object
) -> attngen.Kernel:
    """A kernel of a spec that leaves tile and schedule open."""
    problem = {"head_dim": head_dim, "queries": queries, "keys": "paged"}
    return attngen.compile({"problem": problem, "mask": mask, **more}, arch=arch)


@pytest.mark.matrix
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("arch", "queries"), [("sm_80", "dense"), ("sm_90a", "ragged")])
def test_paged_kernels_compile_without_spills(arch: str, queries: str, head_dim: int, mask: str) -> None:
    """With what `auto` stands for; nothing is read ahead of what the kernels before it leave."""
    assert_compiles_as_planned(paged(arch, head_dim, mask, queries))


@pytest.mark.parametrize("head_dim", [240])
def test_wide_heads_and_scores_in_pages_compile_without_spills(head_dim: int) -> None:
    """Tiles of 64 by 64 spilled there, and not where keys follow one another."""
    assert_compiles_as_planned(paged("sm_90a", head_dim, score="softcap(score, 30.0)"))


def test_a_row_of_k_and_v_is_looked_up_and_no_other() -> None:
    """Copies of K and V go by pages, that of Q by its stride; no size of a page stands in the text."""
    text = emit(paged("sm_80", 64).call.attention)
    body = text[text.index("// ---- this kernel") :]
    assert set(re.findall(r"(load_\w*tile)<(\w)Tile", body)) == {
        ("load_tile", "Q"),
        ("load_paged_tile", "K"),
        ("load_paged_tile", "V"),
    }
    assert "k_stride_page" in body and "k_stride_batch" not in body and "q_stride_batch" in body
    assert "int page_size;" in body and "kPageSize" not in text
