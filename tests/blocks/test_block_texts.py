"""The CUDA text of kernels with given blocks: what asks for a block, and what NVRTC makes of it."""

import pytest

import attngen
from attngen.plan import KernelPlan


def kernel_of(
    head_dim: object, blocks: tuple[int, int], arch: str = "sm_90a", mask: str = "causal", **spec: object
) -> attngen.Kernel:
    sizes = dict(zip(("block_m", "block_n"), blocks, strict=True))
    data = {"problem": {"head_dim": head_dim}, "mask": mask, "blocks": sizes, "gradients": ["q", "k", "v"]}
    return attngen.compile({**data, **spec}, arch=arch)


def texts(kernel: attngen.Kernel) -> list[str]:
    """Those of programs, forward and backward."""
    programs = (plan for plan in kernel.call.kernels if isinstance(plan, KernelPlan))
    return [kernel.modules[plan.module].source for plan in programs]


def body_of(text: str, function: str) -> str:
    """The text of a device function."""
    _, _, rest = text.partition(f" {function}(")
    return rest.partition("\n}")[0]


@pytest.mark.parametrize("mask", ["full", "causal", "document(doc)"])
def test_a_tile_in_one_block_asks_once_and_pairs_do_not_ask(mask: str) -> None:
    """Classes read the map at one place; what pairs are asked reads no map."""
    tensors = {"tensors": {"doc": "i32[batch, seqlen_k]"}} if "doc" in mask else {}
    for text in texts(kernel_of(128, (128, 128), mask=mask, **tensors)):
        assert body_of(text, "may_see").count("read_arg_blocks(") == 1
        assert body_of(text, "must_see").count("read_arg_blocks(") == 1
        assert "some_kept" not in text and "all_kept" not in text
        for function in ("is_visible", "end_key", "first_key"):
            assert "arg_blocks" not in body_of(text, function)


def test_a_tile_across_blocks_asks_for_each_in_a_loop() -> None:
    """Its classes; and pairs ask for their own."""
    for text in texts(kernel_of(128, (100, 72))):
        assert "some_kept(" in body_of(text, "may_see") and "all_kept(" in body_of(text, "must_see")
        assert body_of(text, "is_visible").count("read_arg_blocks(") == 1


def test_spans_of_blocks_are_passed_over_by_what_is_no_map() -> None:
    """A span of 32 blocks is classed by the mask alone; of a full mask by nothing."""
    causal = kernel_of(64, (128, 128)).source
    assert "arg_blocks" not in body_of(causal, "may_see_span") and "tile.seqlen_q" in body_of(
        causal, "may_see_span"
    )
    assert "may_see_span(params, tile, tile.m_block" in body_of(causal, "walk_on")
    full = kernel_of(64, (128, 128), mask="full").source
    assert "may_see_span" not in full and "__ballot_sync(~0u, kv_first < tile.seqlen_k);" in body_of(
        full, "walk_on"
    )


def test_the_text_is_the_same_bytes() -> None:
    """Of the same spec."""
    assert texts(kernel_of(64, (64, 96))) == texts(kernel_of(64, (64, 96)))


@pytest.mark.matrix(most=2)
@pytest.mark.parametrize("head_dim", [64, 128, 256, {"qk": 192, "v": 128}, 96], ids=str)
@pytest.mark.parametrize("blocks", [(128, 128), (64, 64), (100, 72)])
@pytest.mark.parametrize("mask", ["causal", "full"])
def test_kernels_compile_without_spills(mask: str, blocks: tuple[int, int], head_dim: object) -> None:
    """Forward, backward and the sheet, on sm_90a: no spill and no stack, in one block and across."""
    kernel = kernel_of(head_dim, blocks, mask=mask)
    kernel.compile()
    for module in kernel.modules.values():
        for used in module.compiled.resources:
            assert (used.spill_stores, used.spill_loads, used.stack_bytes) == (0, 0, 0), used.name


@pytest.mark.matrix(most=2)
@pytest.mark.parametrize(
    ("arch", "spec"),
    [
        ("sm_80", {}),
        ("sm_120", {}),
        ("sm_90a", {"schedule": {"kind": "pingpong"}}),
        ("sm_90a", {"schedule": {"kind": "serial"}, "gradients": []}),
        ("sm_90a", {"score": "softcap(score, 30.0)"}),
        ("sm_90a", {"precision": {"inputs": "e4m3"}, "gradients": []}),
        ("sm_90a", {"mask": "causal and document(doc)", "tensors": {"doc": "i32[batch, seqlen_k]"}}),
    ],
    ids=str,
)
def test_other_kernels_compile_without_spills(arch: str, spec: dict) -> None:
    """Other targets and schedules, a score, e4m3, and a mask with tables of extremes beside the map."""
    kernel = kernel_of(128, (128, 128), arch, **spec)
    kernel.compile()
    for module in kernel.modules.values():
        for used in module.compiled.resources:
            assert (used.spill_stores, used.spill_loads, used.stack_bytes) == (0, 0, 0), used.name
