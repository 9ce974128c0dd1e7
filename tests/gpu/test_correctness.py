"""The emitted kernels on a GPU, against the fp64 reference; `test_grid_on_gpu.py` has the lengths."""

from itertools import product

import pytest
import torch
from gpu_kernels import KINDS, WARPGROUP_KINDS, Wanted, compile_all, kernel, skip_unless_runs_here

import attngen
from attngen.check.accuracy import compare
from attngen.check.declared_inputs import declared_inputs
from attngen.check.inputs import Canary, MemoryLayout, Shape, poison, random_inputs
from attngen.check.judging import draw, judge
from tests.check.length_grid import Point
from tests.check.length_grid import judge as judge_point

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

MASKS = (
    "kv_idx >= q_pos - 40 and causal",
    "kv_idx > q_pos - 200 and kv_idx <= q_pos + 77",
    "kv_idx + h != q_idx",
    "kv_idx == q_pos",
    "kv_idx <= q_pos - 30 * h + b",
    "kv_idx < 5 or kv_idx > q_pos - 70 and kv_idx != q_idx",
    "false",
)
DIMS = ((64, 64), (128, 128), (192, 128))


@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_the_language_are_right(kind: str) -> None:
    """Windows have closed-form bounds on both sides, != has none, and each gives what the reference gives."""
    skip_unless_runs_here(kind)
    bad = []
    for made in compile_all([Wanted(kind, mask) for mask in MASKS]):
        for lengths in ((113, 203), (300, 300), (203, 113), (500, 700)):
            q, k, v = random_inputs(Shape(3, 4, 2, *lengths), 64, 64, torch.bfloat16, "cuda", 3)
            out, lse = made(q, k, v, return_lse=True)
            accuracy = compare(out, lse, q, k, v, made.spec.mask_expr)
            if not accuracy.ok:
                bad.append(f"{made.plan.mask_text}, {lengths}: {accuracy}")
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("dims", DIMS, ids=lambda dims: f"d{dims[0]}x{dims[1]}")
@pytest.mark.parametrize("kind", WARPGROUP_KINDS)
def test_variants_of_a_schedule_are_right(kind: str, dims: tuple[int, int]) -> None:
    """With and without overlap, drawn and launched tiles, in either order: right, and of one overlap bitwise equal."""
    skip_unless_runs_here(kind)
    fields = [
        {"overlap": overlap, "persistent": persistent, "order": order}
        for overlap, (persistent, order) in product(
            (True, False), ((True, "heads"), (True, "rows"), (False, "heads"))
        )
    ]
    every = compile_all([Wanted(kind, "causal", "bf16", dims, schedule) for schedule in fields])
    for seed, lengths in enumerate(((1, 1), (113, 203), (300, 1000), (1000, 300), (700, 700))):
        point = Point(Shape(3, 8, 2, *lengths), dims, "bf16", "causal", seed=seed)
        q, k, v = point.draw("cuda")
        for i, made in enumerate(every):
            if i % 3 == 0:
                verdict = judge_point(made, point, "cuda", layouts=())
                assert verdict.ok, f"{fields[i]}: {verdict}"
                expected = made(q, k, v)
            assert torch.equal(made(q, k, v), expected), f"{fields[i]}, {lengths}"


@pytest.mark.parametrize("kind", WARPGROUP_KINDS)
def test_other_tiles_are_right(kind: str) -> None:
    """One, two and three warpgroups, one to four stages, narrow and wide blocks of keys."""
    skip_unless_runs_here(kind)
    tiles = ((1, 16, 1), (1, 64, 4), (2, 48, 3), (2, 176, 2), (3, 32, 1), (3, 96, 2))
    every = [
        Wanted(kind, "causal", schedule={"warpgroups": n, "stages": stages}, tile={"block_n": block_n})
        for n, block_n, stages in tiles
    ]
    for made in compile_all(every):
        for seed, lengths in enumerate(((65, 17), (113, 203), (500, 700))):
            point = Point(Shape(3, 4, 1, *lengths), (64, 64), "bf16", "causal", seed=seed)
            verdict = judge_point(made, point, "cuda", layouts=())
            assert verdict.ok, (
                f"{made.plan.block_m}x{made.plan.block_n}, {made.plan.stages} stages: {verdict}"
            )


@pytest.mark.parametrize("scale", [-0.3, 0.0, 0.02])
@pytest.mark.parametrize("kind", KINDS)
def test_any_finite_scale(kind: str, scale: float) -> None:
    """A negative scale prefers the smallest products, and a scale of 0 averages what is visible."""
    made = kernel(kind)
    q, k, v = random_inputs(Shape(2, 4, 2, 113, 203), 64, 64, torch.bfloat16, "cuda", 4)
    out, lse = made(q, k, v, softmax_scale=scale, return_lse=True)
    accuracy = compare(out, lse, q, k, v, made.spec.mask_expr, scale)
    assert accuracy.ok, str(accuracy)


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("kind", WARPGROUP_KINDS)
def test_maxima_that_are_negative(kind: str, mask: str) -> None:
    """Integers tell the larger of two positive scores alone: rows of negative ones beside others, from any block on."""
    made = kernel(kind, mask, "bf16", (128, 128))
    q, k, v = random_inputs(Shape(2, 4, 2, 300, 515), 128, 128, torch.bfloat16, "cuda", 11)
    k = k.abs()
    signs = (torch.arange(300, device="cuda") % 3 - 1).view(1, -1, 1, 1)  # in one warp -, 0 and +
    for size, turns in ((1.0, 515), (6.0, 515), (2.0, 200)):
        keys = torch.where(torch.arange(515, device="cuda").view(1, -1, 1, 1) < turns, k, -k)
        queries = (q.abs() * size * signs).bfloat16()
        out, lse = made(queries, keys, v, return_lse=True)
        accuracy = compare(out, lse, queries, keys, v, made.spec.mask_expr)
        assert accuracy.ok, f"{size}, {turns}: {accuracy}"


@pytest.mark.parametrize("kind", KINDS)
def test_no_keys_gives_zero_and_minus_infinity(kind: str) -> None:
    """Without keys, out is 0 and lse -inf; without queries nothing is launched."""
    made = kernel(kind)
    q, k, v = random_inputs(Shape(2, 4, 2, 65, 0), 64, 64, torch.bfloat16, "cuda", 5)
    out, lse = made(q, k, v, return_lse=True)
    assert torch.equal(out, torch.zeros_like(out)) and torch.isneginf(lse).all()
    assert made(q[:, :0], k, v).shape == (2, 0, 4, 64)


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("kind", KINDS)
def test_poison_around_the_inputs_changes_nothing(kind: str, mask: str) -> None:
    """Inputs inside NaN, Inf and 6e4 give the bits they give alone, and nothing around out is written."""
    made = kernel(kind, mask, "f16", (80, 80))
    q, k, v = random_inputs(Shape(2, 4, 2, 113, 203), 80, 80, torch.float16, "cuda", 6)
    expected = made(q, k, v)
    canary = Canary(tuple(expected.shape), torch.float16, "cuda")
    made(*poison(q, k, v), out=canary.out)
    assert torch.equal(canary.out, expected)
    assert not canary.damaged() and not canary.unwritten()


@pytest.mark.parametrize("kind", KINDS)
def test_repeats_are_bitwise_equal_and_a_slice_is_the_batch_of_one(kind: str) -> None:
    """The same call gives the same bits, whatever else is in the batch."""
    made = kernel(kind, dims=(128, 128))
    q, k, v = random_inputs(Shape(3, 4, 2, 300, 333), 128, 128, torch.bfloat16, "cuda", 7)
    first = made(q, k, v)
    assert all(torch.equal(made(q, k, v), first) for _ in range(20))
    assert torch.equal(made(q[1:2], k[1:2], v[1:2]), first[1:2])


@pytest.mark.parametrize("layout", ["expanded", "packed_qkv"])
@pytest.mark.parametrize("kind", KINDS)
def test_shared_memory_layouts_give_the_same_bits(kind: str, layout: MemoryLayout) -> None:
    """K and V repeated by strides of 0, and slices of one packed tensor, give what copies of them give."""
    made = kernel(kind)
    for lengths in ((203, 203), (113, 300)):
        drawn = random_inputs(Shape(3, 8, 2, *lengths), 64, 64, torch.bfloat16, "cuda", 8, layout)
        assert not all(x.is_contiguous() for x in drawn)
        out, lse = made(*drawn, return_lse=True)
        again, lse_again = made(*(x.contiguous() for x in drawn), return_lse=True)
        assert torch.equal(out, again) and torch.equal(lse, lse_again)
        accuracy = compare(out, lse, *drawn, made.spec.mask_expr)
        assert accuracy.ok, str(accuracy)


@pytest.mark.parametrize("kind", WARPGROUP_KINDS)
def test_what_the_copy_engine_cannot_take_is_refused(kind: str) -> None:
    """An address or a stride off 16 bytes is an ArgumentError that names the tensor; the kernel still runs after it."""
    made = kernel(kind)
    good = random_inputs(Shape(2, 4, 4, 65, 65), 64, 64, torch.bfloat16, "cuda", 9)
    expected = made(*good)
    for i, name in enumerate("qkv"):
        x = good[i]
        shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view(x.shape).copy_(x)
        padded = torch.empty(*x.shape[:3], 68, dtype=x.dtype, device="cuda")[..., :64].copy_(x)
        for bad, words in ((shifted, "2 bytes past a multiple of 16"), (padded, "a multiple of 8 elements")):
            with pytest.raises(attngen.ArgumentError, match=f"argument {name}: .*{words}"):
                made(*good[:i], bad, *good[i + 1 :])
    out = torch.empty(expected.numel() + 1, dtype=expected.dtype, device="cuda")[1:].view(expected.shape)
    with pytest.raises(attngen.ArgumentError, match="argument out: .*2 bytes past a multiple of 16"):
        made(*good, out=out)
    assert torch.equal(made(*good), expected)


@pytest.mark.parametrize("kind", ["fa2", *WARPGROUP_KINDS])
def test_a_tensor_of_more_than_2_to_the_31_elements(kind: str) -> None:
    """Offsets are 64-bit: the last batch of a 4.3 GB tensor equals the same batch alone, read or written."""
    made = kernel(kind, "full")
    q = torch.randn(2, 1024, 1, 64, device="cuda", dtype=torch.bfloat16)
    expected = made(q, q, q)
    storage = torch.empty(2**31 + 2**20, device="cuda", dtype=torch.bfloat16)
    far = storage.as_strided((2, 1024, 1, 64), (2**31, 64, 64, 1))
    far.copy_(q)
    assert torch.equal(made(far, far, far), expected)
    far.zero_()
    assert torch.equal(made(q, q, q, out=far), expected)
    rows = storage.as_strided((1, 33, 1, 64), (0, 2**26, 64, 1))
    rows.copy_(q[:1, :33])
    near = q[:1, :33].contiguous()
    assert torch.equal(made(rows, rows, rows), made(near, near, near))


def test_shipped_specs_pass_their_check_shapes() -> None:
    """Every shipped spec that this GPU can run is right on its own check shapes."""
    from attngen.api import resolve_arch
    from attngen.cli.shapes import shapes_of
    from attngen.resources import shipped_specs

    capability = torch.cuda.get_device_capability()
    ran = 0
    for path in shipped_specs():
        made_for = attngen.load(path)
        if not resolve_arch(made_for).runs_on(capability):
            continue
        made = attngen.compile(made_for)
        for shape in shapes_of(made_for):
            q, k, v = draw(made.plan, shape, "cuda", 8)
            passed = declared_inputs(made_for.declarations, shape, device="cuda", seed=8)
            passed |= shape.arguments(q.device)
            out, lse = made(q, k, v, return_lse=True, **passed)
            accuracy = judge(made_for, made.plan, out, lse, q, k, v, declared=passed)
            assert accuracy.ok, f"{path.name}: {accuracy}"
            ran += 1
    assert ran >= 3
