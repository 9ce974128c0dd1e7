"""What NVRTC makes of kernels of an e4m3 cache. Needs no GPU."""

import pytest

import attngen
from attngen.emit import emit
from tests.emit.test_compiled import assert_compiles_as_planned

pytestmark = pytest.mark.usefixtures("nvdisasm")
MASKS = ("causal", "window(1024, 0)", "causal and (window(128, 0) or sinks(4))")


def cached(
    arch: str,
    head_dim: int,
    scales: str = "per_head",
    mask: str = "causal",
    inputs: str = "bf16",
    **more: object,
) -> attngen.Kernel:
    """A kernel of a spec that leaves tile and schedule open."""
    problem = {"head_dim": head_dim, "keys": "paged"}
    precision = {"inputs": inputs, "cache": "e4m3", "scales": scales}
    return attngen.compile({"problem": problem, "precision": precision, "mask": mask, **more}, arch=arch)


@pytest.mark.matrix
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("split", ["none", "auto"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("scales", ["per_head", "per_token", "per_page"])
@pytest.mark.parametrize(("arch", "inputs"), [("sm_89", "f16"), ("sm_90a", "bf16")])
def test_kernels_of_a_cache_compile_without_spills(
    arch: str, inputs: str, scales: str, head_dim: int, split: str, mask: str
) -> None:
    """With what `auto` stands for."""
    assert_compiles_as_planned(cached(arch, head_dim, scales, mask, inputs, split=split))


@pytest.mark.matrix
@pytest.mark.parametrize("head_dim", [80, 240])
@pytest.mark.parametrize("keys", ["padded", "ragged", "dense"])
def test_other_widths_and_keys_compile_without_spills(keys: str, head_dim: int) -> None:
    """An odd number of chunks of columns, and the widest row with scores."""
    problem = {"head_dim": head_dim, "keys": keys, "queries": "ragged" if keys == "ragged" else "dense"}
    kernel = cached("sm_90a", head_dim, "per_token", problem=problem, score="softcap(score, 30.0)")
    assert_compiles_as_planned(kernel)


def test_rows_of_a_cache_are_moved_as_they_are() -> None:
    """16 bytes are 16 numbers: K and V lie in shared memory as e4m3, and no wider copy of them is made."""
    text = emit(cached("sm_90a", 128).call.attention)
    body = text[text.index("// ---- this kernel") :]
    assert "using KTile = SmemTile<kBlockN, kQkCols, kHeadDimQk, 16>;" in body
    assert "cvt.rn.f16x2.e4m3x2" in text and "using Input = F16;" in body
    assert (
        body.count("gemm_nt_ss_8bit<") == body.count("gemm_nn_rs_8bit<") == 2
    )  # in partial and in full blocks
