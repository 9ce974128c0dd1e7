"""Lists of kept blocks: FlexAttention's and FlashAttention-4's as they are, and the sheet that makes maps of them."""

import ctypes
from typing import NamedTuple

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from attngen.emit import emit_module
from attngen.plan import BLOCK_LISTS, BLOCK_MAP, MORE_BLOCK_LISTS, MapBlocks, evaluate_formula
from attngen.runtime import DiskCache, disassemble
from attngen.simulate.simulated_sheets import map_blocks
from attngen.simulate.visits import Sizes
from tests.blocks.block_cases import SCHEDULES, BlockCase, are_equal, lists_of, run
from tests.emit.sass import done_before_waiting
from tests.quantize.on_cpu import CpuKernels

C_TYPES = {"pointer": ctypes.c_void_p, "i64": ctypes.c_int64, "i32": ctypes.c_int32}


class BlockSparse(NamedTuple):
    """Tensors by FlashAttention-4's names."""

    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor | None = None
    full_block_idx: torch.Tensor | None = None
    block_size: tuple[int, int] | None = None


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_lists_are_the_map_that_they_list(schedule: str) -> None:
    """Bit by bit, output and gradients; what lies behind a count is not looked at."""
    case = BlockCase(schedule)
    kept, inputs = case.drawn(), case.inputs()
    counts, indices = lists_of(kept)
    assert (indices == 2**30).any()
    found = run(case.kernel, inputs, blocks=kept)
    assert are_equal(found, run(case.kernel, inputs, blocks=(counts, indices)))


def flex_mask(case: BlockCase) -> BlockMask:
    """Causal, within documents of 50 that differ from head to head, as torch makes it on the CPU."""
    (rows, keys), (heads, _) = case.lengths, case.heads

    def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (q >= k) & (q // (50 + 10 * h) == k // (50 + 10 * h))

    return create_block_mask(mask_mod, case.batch, heads, rows, keys, device="cpu", BLOCK_SIZE=case.blocks)


def test_a_block_mask_of_torch_is_taken_as_it_is() -> None:
    """Both kinds of its lists are kept blocks; the mask within them is the spec's."""
    case = BlockCase(lengths=(300, 300), blocks=(32, 16))
    made, inputs = flex_mask(case), case.inputs()
    assert made.full_kv_num_blocks.any() and made.kv_num_blocks.any()  # type: ignore[union-attr]
    found = run(case.kernel, inputs, blocks=made)
    dense = made.to_dense().bool()
    assert dense.any() and not dense.all()
    assert are_equal(found, run(case.kernel, inputs, blocks=dense))


def test_a_block_mask_with_its_own_mask_is_what_torch_computes() -> None:
    """FlexAttention on the CPU, whose mask_mod the spec writes out, to the bound of bf16."""
    case = BlockCase(
        mask="q_idx >= kv_idx and q_idx // (50 + 10 * h) == kv_idx // (50 + 10 * h)", lengths=(300, 300)
    )
    q, k, v, _ = case.inputs()
    made = flex_mask(case)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.float().transpose(1, 2) for x in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2))),
        attn_mask=torch.stack(
            [made.mask_mod(0, h, torch.arange(300)[:, None], torch.arange(300)) for h in range(4)]
        ),
    )
    out = case.kernel(q, k, v, blocks=made)
    assert (
        out.float().transpose(1, 2) - expected
    ).abs().max() < 2e-2  # 2.5 units in the last place of bf16 at 1 to 2


def test_names_of_flash_attention_4_are_taken_as_they_are() -> None:
    """With and without the lists of blocks in which nothing is masked, and with one kind of lists for all heads."""
    case = BlockCase()
    first, second, inputs = case.drawn(0.3, seed=4), case.drawn(0.3, seed=5), case.inputs()
    both = BlockSparse(*lists_of(first), *lists_of(second))
    expected = run(case.kernel, inputs, blocks=first | second)
    assert are_equal(expected, run(case.kernel, inputs, blocks=both))
    assert are_equal(expected, run(case.kernel, inputs, blocks=both._replace(block_size=case.blocks)))
    one = BlockSparse(*lists_of(first))
    assert are_equal(run(case.kernel, inputs, blocks=first), run(case.kernel, inputs, blocks=one))
    shared = BlockSparse(*lists_of(first), *lists_of(second[:1, :1]))
    expected = run(case.kernel, inputs, blocks=first | second[:1, :1])
    assert are_equal(expected, run(case.kernel, inputs, blocks=shared))


# ---- the sheet ------------------------------------------------------------------------------------------------------
def wild_lists(shape: tuple[int, int, int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts and indices of which many are no count and no block: below 0, too large, and twice the same."""
    generator = torch.Generator().manual_seed(seed)
    blocks = shape[3]
    counts = torch.randint(-2, blocks + 4, shape[:3], generator=generator)
    indices = torch.randint(-3, blocks + 3, shape, generator=generator)
    indices[..., 0] = torch.tensor([-(2**31), 2**31 - 1])[torch.arange(shape[2]) % 2]
    return counts.to(torch.int32), indices.to(torch.int32)


def listed_by_hand(
    lists: list[tuple[torch.Tensor, torch.Tensor]], shape: tuple[int, int, int, int]
) -> torch.Tensor:
    """The map, place by place."""
    kept = torch.zeros(shape, dtype=torch.bool)
    for counts, indices in lists:
        for b, h, m in torch.cartesian_prod(*map(torch.arange, shape[:3])).tolist():
            for i in range(min(int(counts[b, h, m]), shape[3])):
                if 0 <= (n := int(indices[b, h, m, i])) < shape[3]:
                    kept[b, h, m, n] = True
    return kept


SHAPES = ((2, 3, 4, 5), (1, 1, 1, 1), (1, 2, 3, 300))


def sheet() -> MapBlocks:
    return MapBlocks(BlockCase(target="sm_90a", dim=64).kernel.plan)


@pytest.mark.parametrize("kinds", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_text_and_the_torch_function_make_the_map_that_is_listed(
    shape: tuple[int, int, int, int], kinds: int
) -> None:
    """The text run by g++, on lists with gaps between their elements: what is no block, or no place, is passed over."""
    lists = [wild_lists(shape, seed) for seed in range(kinds)]
    expected = listed_by_hand(lists, shape)
    names = (BLOCK_LISTS, MORE_BLOCK_LISTS)[:kinds]
    given = {
        name: x for pair, found in zip(names, lists, strict=True) for name, x in zip(pair, found, strict=True)
    }
    kept = torch.full(shape, True)
    made = map_blocks(sheet(), {BLOCK_MAP: kept, **given}, Sizes(1, 1, 1, 1, 1))
    assert torch.equal(made[BLOCK_MAP], expected)

    spread = {
        name: x.new_empty(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x) for name, x in given.items()
    }
    of, sizes = (
        sheet(),
        dict(zip(("blocks_batch", "blocks_heads", "blocks_m", "blocks_n"), shape, strict=True)),
    )
    carried = {param.value: 0 for param in of.params} | {f"size.{name}": size for name, size in sizes.items()}
    carried[f"{BLOCK_MAP}.ptr"] = kept.data_ptr()
    for name, x in spread.items():
        carried |= {f"{name}.stride_{i}": step for i, step in enumerate(x.stride())}
        carried[f"{name}.ptr"] = x.data_ptr()

    class Params(ctypes.Structure):
        _fields_ = [(param.name, C_TYPES[param.ctype]) for param in of.params]

    params = Params(*(carried[param.value] for param in of.params))
    kernel = CpuKernels(emit_module((of,))).function(of.name, 0, False)
    kernel.run(ctypes.byref(params), evaluate_formula(of.grid, carried), of.threads)
    assert torch.equal(kept, expected)


@pytest.mark.usefixtures("nvdisasm")
def test_the_text_of_the_sheet_compiles_without_spills() -> None:
    """Nothing spills, and nothing is read before the kernel has waited for the one that makes the lists."""
    of = sheet()
    assert emit_module((of,)) == emit_module((sheet(),))
    compiled = DiskCache().get(emit_module((of,)), "sm_90a")
    (used,) = compiled.resources
    assert compiled.warnings == () and (used.spill_stores, used.spill_loads, used.stack_bytes) == (0, 0, 0)
    assert not done_before_waiting(disassemble(compiled.cubin))


def test_the_map_is_made_once_a_call_and_where_lists_are_passed_alone() -> None:
    """A map that is passed is read where it lies."""
    case = BlockCase()
    manifest = case.kernel.manifest
    sizes = {"seqlen_k": 139}
    of_map = manifest.launches_for({"q", "k", "v", BLOCK_MAP}, ("out", "lse"), sizes)
    of_lists = manifest.launches_for({"q", "k", "v", *BLOCK_LISTS}, ("out", "lse"), sizes)
    assert len(of_map) == 1 and [launch.writes for launch in of_lists] == [(BLOCK_MAP,), of_map[0].writes]
