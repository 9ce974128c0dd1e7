"""Inputs hold the same values in every storage; poison and canaries show what they claim to."""

import math

import pytest
import torch
from torch import Tensor

from attngen.check.accuracy import compare
from attngen.check.inputs import (
    ALIGNMENT_BYTES,
    EXACT_SCALE,
    KINDS,
    MEMORY_LAYOUTS,
    SPAN,
    Canary,
    Kind,
    MemoryLayout,
    Shape,
    poison,
    random_inputs,
)
from attngen.check.reference import attention, standard_attention

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [
    Shape(2, 6, 2, 13, 9),
    Shape(3, 4, 4, 7, 7),
    Shape(1, 1, 1, 1, 5),
    Shape(2, 2, 1, 0, 3),
    Shape(0, 2, 1, 3, 0),
]


@pytest.mark.matrix
@pytest.mark.parametrize("layout", MEMORY_LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_layout_holds_the_same_values(
    layout: MemoryLayout, kind: Kind, dtype: torch.dtype, shape: Shape
) -> None:
    """Shapes are (batch, seqlen, heads, head_dim), values those of `contiguous`; two draws are equal."""
    drawn = random_inputs(shape, 24, 16, dtype, seed=5, layout=layout, kind=kind)
    again = random_inputs(shape, 24, 16, dtype, seed=5, layout=layout, kind=kind)
    plain = random_inputs(shape, 24, 16, dtype, seed=5, kind=kind)
    sizes = [
        (shape.batch, shape.seqlen_q, shape.heads, 24),
        (shape.batch, shape.seqlen_k, shape.heads_kv, 24),
        (shape.batch, shape.seqlen_k, shape.heads_kv, 16),
    ]
    for i, (x, y, z, size) in enumerate(zip(drawn, again, plain, sizes, strict=True)):
        assert tuple(x.shape) == size and x.dtype == dtype
        assert torch.equal(x, y)
        assert x.stride(-1) == 1 or x.numel() == 0
        if layout != "expanded" or i == 0:
            assert torch.equal(x, z)


@pytest.mark.parametrize("layout", MEMORY_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim_qk", "head_dim_v"), [(24, 16), (40, 40), (192, 128)])
def test_rows_start_on_the_alignment(
    layout: MemoryLayout, dtype: torch.dtype, head_dim_qk: int, head_dim_v: int
) -> None:
    """With head_dim a multiple of 8, the base and every stride are multiples of 16 bytes."""
    for x in random_inputs(Shape(2, 6, 2, 9, 9), head_dim_qk, head_dim_v, dtype, layout=layout):
        assert x.data_ptr() % ALIGNMENT_BYTES == 0
        assert all(stride * x.element_size() % ALIGNMENT_BYTES == 0 for stride in x.stride()[:3])


def test_layouts_are_what_they_are_called() -> None:
    """Each layout's strides, offsets and shared storage are those of its name."""
    shape = Shape(2, 6, 2, 9, 9)
    drawn = {name: random_inputs(shape, 24, 16, torch.bfloat16, layout=name) for name in MEMORY_LAYOUTS}
    assert all(x.is_contiguous() for x in drawn["contiguous"])
    for x in drawn["strided"]:
        batch, seqlen, heads, head_dim = x.shape
        assert (
            x.stride(2) > head_dim
            and x.stride(1) > heads * x.stride(2)
            and x.stride(0) > seqlen * x.stride(1)
        )
    q, k, v = drawn["packed_qkv"]
    assert len({x.untyped_storage().data_ptr() for x in (q, k, v)}) == 1
    assert q.stride(1) == k.stride(1) == v.stride(1) == 6 * 24 + 2 * 24 + 2 * 16
    assert (q.storage_offset(), k.storage_offset(), v.storage_offset()) == (0, 6 * 24, 8 * 24)
    q, k, v = drawn["expanded"]
    assert k.stride(0) == 0 and v.stride(2) == 0 and q.is_contiguous()
    assert torch.equal(k[0], k[1]) and torch.equal(v[:, :, 0], v[:, :, 1])
    assert [x.storage_offset() * 2 for x in drawn["offset"]] == [16, 48, 80]
    assert all(x.transpose(1, 2).is_contiguous() and not x.is_contiguous() for x in drawn["bhsd"])


def test_packed_with_unequal_lengths_packs_k_and_v() -> None:
    """Where seqlen_q is not seqlen_k, k and v share a storage and q has its own."""
    q, k, v = random_inputs(Shape(2, 4, 2, 5, 9), 16, 16, torch.float16, layout="packed_qkv")
    assert k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr() != q.untyped_storage().data_ptr()


def test_strided_size_one_dimensions_have_odd_strides() -> None:
    """A dimension of size 1 gets a stride on no boundary, as a slice of any tensor may have."""
    q, k, _ = random_inputs(Shape(1, 2, 1, 1, 5), 16, 16, torch.float16, layout="strided")
    assert (q.stride(0), q.stride(1)) == (3, 3) and (k.stride(0), k.stride(2)) == (3, 3)
    assert k.stride(1) % 8 == 0


@pytest.mark.parametrize("layout", ["strided", "offset"])
def test_gaps_hold_nan(layout: MemoryLayout) -> None:
    """All of the storage that is not the tensor's own is NaN: a kernel that uses it shows it."""
    for x in random_inputs(Shape(2, 6, 2, 13, 9), 24, 16, torch.float16, layout=layout):
        whole = x.new_empty(0).set_(x.untyped_storage())
        assert int(whole.isfinite().sum()) == x.numel() < whole.numel()
        assert x.isfinite().all()


def test_seeds_differ() -> None:
    """Another seed gives other values, and q, k and v are not copies of one another."""
    shape = Shape(1, 2, 2, 8, 8)
    first = random_inputs(shape, 16, 16, torch.float32, seed=0)
    second = random_inputs(shape, 16, 16, torch.float32, seed=1)
    tensors: list[Tensor] = [*first, *second]
    assert all(not torch.equal(x, y) for i, x in enumerate(tensors) for y in tensors[:i])


def test_kinds_have_their_distribution() -> None:
    """A million draws: N(0, 1); a thousandth of variance 100; integers of the stated ranges."""
    shape = Shape(1, 16, 16, 1024, 1024)
    q, _, _ = random_inputs(shape, 64, 64, torch.float32, kind="randn")
    assert abs(q.mean()) < 0.005 and abs(q.var() - 1) < 0.01 and q.abs().max() < 6.5
    q, k, v = random_inputs(shape, 64, 64, torch.float32, kind="outliers")
    for x in (q, k, v):
        assert (
            abs(x.var() - 1.1) < 0.03
        )  # 1 + 100 / 1000, of which the standard deviation over 2^20 draws is 0.005
        assert 0.0004 < (x.abs() > 6).double().mean() < 0.0007  # 0.001 * P(|N(0, 101)| > 6) = 0.00055
    q, k, v = random_inputs(shape, 64, 64, torch.float32, kind="integers")
    assert set(q.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert set(v.unique().tolist()) == {-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0}
    assert set(k.abs().sum(-1).unique().tolist()) == {1.0, 2.0}
    assert (k != 0).any(dim=1).all(), "some column of k is never used"
    assert set((q[0, :, 0] @ k[0, :, 0].T).unique().tolist()) == {-2.0, -1.0, 0.0, 1.0, 2.0}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integer_sums_are_exact_in_any_order(dtype: torch.dtype) -> None:
    """With EXACT_SCALE, permuting 4096 keys changes no bit of the yardstick's out: nothing is rounded."""
    q, k, v = random_inputs(Shape(1, 2, 1, 16, 4096), 64, 32, dtype, kind="integers")
    order = torch.randperm(4096, generator=torch.Generator().manual_seed(1))
    out, lse = standard_attention(q, k, v, softmax_scale=EXACT_SCALE)
    permuted, permuted_lse = standard_attention(q, k[:, order], v[:, order], softmax_scale=EXACT_SCALE)
    assert torch.equal(out, permuted) and torch.equal(lse, permuted_lse)
    assert out.unique().numel() > 100


def test_outliers_survive_f16() -> None:
    """No draw of 4 million leaves f16's range: the outliers are large, not infinite."""
    for x in random_inputs(Shape(4, 16, 16, 1024, 1024), 64, 64, torch.float16, kind="outliers")[:1]:
        assert x.isfinite().all() and x.abs().max() > 20


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [Shape(2, 6, 2, 13, 9), Shape(1, 1, 1, 1, 1), Shape(2, 2, 1, 5, 0)], ids=str
)
def test_poison_surrounds_equal_values(dtype: torch.dtype, shape: Shape) -> None:
    """The views equal what was given; 256 aligned rows of NaN, inf, 6e4, -inf lie on both sides."""
    given = random_inputs(shape, 24, 16, dtype)
    for x, y in zip(poison(*given), given, strict=True):
        assert torch.equal(x, y)
        assert x.data_ptr() % ALIGNMENT_BYTES == 0 and x.stride(1) * x.element_size() % ALIGNMENT_BYTES == 0
        whole = x.new_empty(0).set_(x.untyped_storage())
        row, start = x.stride(1), x.storage_offset()
        assert int(whole.isnan().sum()) > 256
        six = int((whole.abs() > 5e4).logical_and(whole.isfinite()).sum())
        assert six == 2 * 64 * x.shape[0] * x.shape[2] * x.shape[3] + (2 * 64 * x.shape[0] * x.shape[2]) * (
            whole.numel() // (x.shape[0] * (512 + x.shape[1]) * (x.shape[2] + 1)) - x.shape[3]
        )
        past = start + x.shape[1] * row
        assert whole[past].isnan() and whole[past + row] == math.inf and whole[past + 3 * row] == -math.inf
        assert whole[past + 2 * row].isfinite() and whole[past + 2 * row] > 5e4
        assert start == 256 * row


def test_poison_is_seen_by_a_read_past_the_end() -> None:
    """An attention that reads one key too many is refused; one that does not is bitwise unchanged."""
    shape = Shape(1, 2, 1, 5, 9)
    q, k, v = random_inputs(shape, 16, 16, torch.float32)
    clean = standard_attention(q, k, v)[0]
    assert torch.equal(standard_attention(*poison(q, k, v))[0], clean)
    for value in (math.nan, math.inf, 6e4):
        _, pk, pv = poison(q, k, v, values=(value,))
        longer = [x.as_strided((1, 10, 1, 16), x.stride(), x.storage_offset()) for x in (pk, pv)]
        assert not compare(standard_attention(q, *longer)[0], None, q, k, v).ok


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_canary_shows_what_was_written(dtype: torch.dtype) -> None:
    """All of out is unwritten at first; writing it leaves the canary whole and nothing unwritten."""
    canary = Canary((2, 5, 3, 12), dtype)
    assert tuple(canary.out.shape) == (2, 5, 3, 12) and canary.out.dtype == dtype
    assert canary.out.isnan().all() and canary.unwritten() == canary.out.numel()
    assert canary.out.data_ptr() % ALIGNMENT_BYTES == 0
    assert all(
        stride * canary.out.element_size() % ALIGNMENT_BYTES == 0 for stride in canary.out.stride()[:3]
    )
    canary.out.copy_(torch.randn(2, 5, 3, 12))
    assert canary.damaged() is None and canary.unwritten() == 0
    canary.out[1, 4, 2, 3:5] = Canary((1, 1, 1, 2), dtype).out[0, 0, 0]
    assert canary.unwritten() == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "place", [(0, -1, 0, 0), (0, -256, 2, 7), (1, 5, 1, 0), (0, 260, 0, 0), (1, 2, 3, 0), (0, 0, 0, 12)]
)
@pytest.mark.parametrize("value", [0.0, math.nan, 1.0])
def test_canary_shows_a_stray_write(
    dtype: torch.dtype, place: tuple[int, int, int, int], value: float
) -> None:
    """A number or an ordinary NaN in any row, head or column around out is reported with its place."""
    canary = Canary((2, 5, 3, 12), dtype)
    canary.out.zero_()
    offset = canary.out.storage_offset() + sum(i * s for i, s in zip(place, canary.out.stride(), strict=True))
    canary.out.as_strided((1,), (1,), offset).fill_(value)
    assert canary.damaged() == place


def test_values_do_not_depend_on_the_dtype_drawn_before() -> None:
    """All dtypes round one f32 draw, so that f16 and bf16 runs of a seed see the same problem."""
    shape = Shape(1, 2, 1, 7, 9)
    exact = random_inputs(shape, 16, 8, torch.float32, seed=3)
    for dtype in (torch.bfloat16, torch.float16):
        for x, y in zip(random_inputs(shape, 16, 8, dtype, seed=3), exact, strict=True):
            assert torch.equal(x, y.to(dtype))
    assert attention(*exact)[0].isfinite().all()


def test_spans_have_scales_of_their_own() -> None:
    """Blocks of K and V reach from 2^-20 to 2^20 and some are zeros; products are those of N(0, 1) at most."""
    q, k, v = random_inputs(Shape(2, 4, 4, 640, 640), 32, 32, torch.bfloat16, kind="spans")
    for x, least, most in ((q, -60, -14), (k, -20, 26), (v, -20, 26)):
        sizes = x.float().unflatten(1, (10, SPAN)).abs().amax((2, 4))  # (batch, blocks, heads)
        assert 0 < int((sizes == 0).sum()) < 40
        sizes = sizes[sizes > 0].log2()
        assert least < sizes.min() < least + 14 and most - 14 < sizes.max() < most + 4
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) / 32**0.5
    assert 0.1 < float(scores.abs().max()) < 2.0**12
