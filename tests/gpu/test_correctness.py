"""The emitted kernels on a GPU, against the fp64 reference."""

import pytest
import torch

import attngen
from attngen.accuracy import compare
from attngen.inputs import Canary, Shape, poison, random_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

LENGTHS = [
    (1, 1),
    (64, 128),
    (113, 203),
    (239, 1),
    (799, 3),
    (128, 217),
    (1023, 1024),
    (1024, 1023),
    (4096, 4096),
]
HEAD_DIMS = [(32, 32), (40, 40), (64, 64), (80, 80), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128)]
HEADS = [(4, 4), (4, 1), (8, 2)]
LAYOUTS = ["contiguous", "strided", "bhsd"]
TORCH = {"f16": torch.float16, "bf16": torch.bfloat16}


def kernel(kind: str, mask: str, inputs: str, dims: tuple[int, int]) -> attngen.Kernel:
    return attngen.compile(
        {
            "problem": {"head_dim": {"qk": dims[0], "v": dims[1]}},
            "mask": mask,
            "precision": {"inputs": inputs},
            "schedule": {"kind": kind},
        }
    )


@pytest.mark.parametrize("dims", HEAD_DIMS, ids=lambda dims: f"d{dims[0]}x{dims[1]}")
@pytest.mark.parametrize("inputs", ["f16", "bf16"])
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("kind", ["fa2", "serial"])
def test_error_stays_in_its_bound_on_the_length_grid(
    kind: str, mask: str, inputs: str, dims: tuple[int, int]
) -> None:
    """Every length of the grid, MHA, MQA and GQA, three memory layouts: out and lse are within the bound."""
    made = kernel(kind, mask, inputs, dims)
    bad = []
    for seed, (seqlen_q, seqlen_k) in enumerate(LENGTHS):
        for offset, (heads, heads_kv) in enumerate(HEADS):
            layout = LAYOUTS[(seed + offset) % len(LAYOUTS)]
            shape = Shape(1 if seqlen_q > 2000 else 3, heads, heads_kv, seqlen_q, seqlen_k)
            q, k, v = random_inputs(shape, *dims, TORCH[inputs], "cuda", seed, layout=layout)
            out, lse = made(q, k, v, return_lse=True)
            accuracy = compare(out, lse, q, k, v, made.spec.mask_expr)
            if not accuracy.ok:
                bad.append(f"{shape} {layout}: {accuracy}")
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    "mask", ["kv_idx >= q_pos - 40 and causal", "kv_idx + h != q_idx", "kv_idx == q_pos"]
)
@pytest.mark.parametrize("kind", ["fa2", "serial"])
def test_masks_of_the_language_are_right(kind: str, mask: str) -> None:
    """A window has closed-form bounds on both sides, != has none, and each gives what the reference gives."""
    made = kernel(kind, mask, "bf16", (64, 64))
    for lengths in ((113, 203), (300, 300), (203, 113)):
        q, k, v = random_inputs(Shape(2, 4, 2, *lengths), 64, 64, torch.bfloat16, "cuda", 3)
        out, lse = made(q, k, v, return_lse=True)
        accuracy = compare(out, lse, q, k, v, made.spec.mask_expr)
        assert accuracy.ok, f"{lengths}: {accuracy}"


@pytest.mark.parametrize("scale", [-0.3, 0.0, 0.02])
@pytest.mark.parametrize("kind", ["fa2", "serial"])
def test_any_finite_scale(kind: str, scale: float) -> None:
    """A negative scale prefers the smallest products, and a scale of 0 averages what is visible."""
    made = kernel(kind, "causal", "bf16", (64, 64))
    q, k, v = random_inputs(Shape(2, 4, 2, 113, 203), 64, 64, torch.bfloat16, "cuda", 4)
    out, lse = made(q, k, v, softmax_scale=scale, return_lse=True)
    accuracy = compare(out, lse, q, k, v, made.spec.mask_expr, scale)
    assert accuracy.ok, str(accuracy)


@pytest.mark.parametrize("kind", ["fa2", "serial"])
def test_no_keys_gives_zero_and_minus_infinity(kind: str) -> None:
    """Without keys, out is 0 and lse -inf; without queries nothing is launched."""
    made = kernel(kind, "causal", "bf16", (64, 64))
    q, k, v = random_inputs(Shape(2, 4, 2, 65, 0), 64, 64, torch.bfloat16, "cuda", 5)
    out, lse = made(q, k, v, return_lse=True)
    assert torch.equal(out, torch.zeros_like(out)) and torch.isneginf(lse).all()
    assert made(q[:, :0], k, v).shape == (2, 0, 4, 64)


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("kind", ["fa2", "serial"])
def test_poison_around_the_inputs_changes_nothing(kind: str, mask: str) -> None:
    """Inputs inside NaN, Inf and 6e4 give the bits they give alone, and nothing around out is written."""
    made = kernel(kind, mask, "f16", (80, 80))
    q, k, v = random_inputs(Shape(2, 4, 2, 113, 203), 80, 80, torch.float16, "cuda", 6)
    expected = made(q, k, v)
    canary = Canary(tuple(expected.shape), torch.float16, "cuda")
    made(*poison(q, k, v), out=canary.out)
    assert torch.equal(canary.out, expected)
    assert not canary.damaged() and not canary.unwritten()


@pytest.mark.parametrize("kind", ["fa2", "serial"])
def test_repeats_are_bitwise_equal_and_a_slice_is_the_batch_of_one(kind: str) -> None:
    """The same call gives the same bits, whatever else is in the batch."""
    made = kernel(kind, "causal", "bf16", (128, 128))
    q, k, v = random_inputs(Shape(3, 4, 2, 300, 333), 128, 128, torch.bfloat16, "cuda", 7)
    first = made(q, k, v)
    assert all(torch.equal(made(q, k, v), first) for _ in range(20))
    assert torch.equal(made(q[1:2], k[1:2], v[1:2]), first[1:2])


def test_a_tensor_of_more_than_2_to_the_31_elements() -> None:
    """Offsets are 64-bit: the last batch of a 4.3 GB tensor equals the same batch alone."""
    made = kernel("fa2", "full", "bf16", (64, 64))
    q = torch.randn(2, 1024, 1, 64, device="cuda", dtype=torch.bfloat16)
    storage = torch.empty(2**31 + 2**20, device="cuda", dtype=torch.bfloat16)
    far = storage.as_strided((2, 1024, 1, 64), (2**31, 64, 64, 1))
    far.copy_(q)
    assert torch.equal(made(far, far, far), made(q, q, q))
    rows = storage.as_strided((1, 33, 1, 64), (0, 2**26, 64, 1))
    rows.copy_(q[:1, :33])
    near = q[:1, :33].contiguous()
    assert torch.equal(made(rows, rows, rows), made(near, near, near))


def test_shipped_specs_pass_their_check_shapes() -> None:
    """Every shipped spec that this GPU can run is right on its own check shapes."""
    from attngen.resources import shipped_specs

    capability = torch.cuda.get_device_capability()
    ran = 0
    for path in shipped_specs():
        made_for = attngen.load(path)
        from attngen.api import resolve_arch

        if not resolve_arch(made_for).runs_on(capability):
            continue
        made = attngen.compile(made_for)
        for check in made_for.check:
            shape = Shape(
                check.batch, check.heads, check.heads_kv or check.heads, check.seqlen_q, check.seqlen_k
            )
            q, k, v = random_inputs(
                shape, made.plan.head_dim_qk, made.plan.head_dim_v, TORCH[made.plan.inputs.name], "cuda", 8
            )
            out, lse = made(q, k, v, return_lse=True)
            assert compare(out, lse, q, k, v, made_for.mask_expr).ok, path.name
            ran += 1
    assert ran >= 3
