"""e4m3 kernels on a GPU: every kind of scale, promoted and not, masks and scores, what a call may pass."""

from typing import Any

import pytest
import torch
from gpu_kernels import compile_specs, counters_are_zero, skip_unless_runs_here, wait_for_gpu

import attngen
from attngen.check.inputs import Kind, Shape
from attngen.check.judging import draw, judge
from attngen.quantize import SCALE_KINDS, unpack_values
from tests.check.language_cases import LanguageCase

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

LENGTHS = ((257, 300), (1, 1), (64, 1000), (300, 129), (515, 515), (0, 3), (3, 0))
CASES = (
    LanguageCase("full"),
    LanguageCase("causal"),
    LanguageCase("window(100, 0)"),
    LanguageCase("window(100, 0) or sinks(4)", "softcap(score, 2.0)"),
    LanguageCase("document(doc) and causal"),
    LanguageCase("causal", "score + alibi(slopes)"),
    LanguageCase("allow[h, q_idx, kv_idx]", "score + bias[h, q_idx, kv_idx]"),
)


@pytest.fixture(autouse=True)
def on_hopper() -> None:
    skip_unless_runs_here("pingpong")


def spec_of(case: LanguageCase = CASES[1], dim: int = 64, **precision: Any) -> dict[str, Any]:
    return case.spec(problem={"head_dim": dim}, precision={"inputs": "e4m3", **precision})


def complaint(
    kernel: attngen.Kernel, case: LanguageCase, lengths: tuple[int, int], kind: Kind = "randn"
) -> str:
    """What is wrong with a call of random inputs, if anything."""
    shape = Shape(2, 4, 2, *lengths)
    inputs, declared = draw(kernel.plan, shape, "cuda", 3, kind=kind), case.arguments(shape, "cuda")
    out, lse = kernel(*inputs, return_lse=True, softmax_scale=case.softmax_scale, **declared)
    found = judge(
        kernel.spec, kernel.plan, out, lse, *inputs, softmax_scale=case.softmax_scale, declared=declared
    )
    return "" if found.ok else f"{kernel.plan.name} {case} {lengths} {kind}: {found}"


@pytest.mark.parametrize("promote", [0, 1])
@pytest.mark.parametrize("scales", SCALE_KINDS)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_masks_and_scores_are_right(dim: int, scales: str, promote: int) -> None:
    """Lengths beside the tiles, no key and no row included; outliers and scales of many orders too."""
    is_too_wide = (dim, scales, promote) == (
        256,
        "per_token",
        1,
    )  # refused with lookups for each pair: tests/lower
    cases = CASES[:-1] if is_too_wide else CASES
    made = compile_specs([spec_of(case, dim, scales=scales, promote=promote) for case in cases])
    wrong = [
        complaint(kernel, case, lengths, kind)
        for kernel, case in zip(made, cases, strict=True)
        for lengths in LENGTHS
        for kind in (("randn", "outliers", "spans") if lengths == (257, 300) else ("randn",))
    ]
    assert not any(wrong), "\n".join(filter(None, wrong))
    assert counters_are_zero()


@pytest.mark.parametrize("dims", [(80, 80), (96, 96), (192, 192), (192, 128), (48, 112)])
def test_other_head_dims_are_right(dims: tuple[int, int]) -> None:
    specs = [
        {
            "problem": {"head_dim": {"qk": dims[0], "v": dims[1]}},
            "precision": {"inputs": "e4m3", "scales": scales, "promote": promote},
            "mask": "causal",
        }
        for scales in ("per_head", "per_block")
        for promote in (0, 1)
    ]
    wrong = [complaint(made, CASES[1], lengths) for made in compile_specs(specs) for lengths in LENGTHS]
    assert not any(wrong), "\n".join(filter(None, wrong))


@pytest.mark.parametrize("scales", ["per_tensor", "per_block"])
def test_hadamard_is_right_and_spreads_outliers(scales: str) -> None:
    """Within its bound, and on outlier-laden inputs nearer to attention on them than without the matrix."""
    plain, spread = compile_specs(
        [spec_of(dim=128, scales=scales, incoherent=which) for which in ("none", "hadamard")]
    )
    assert not complaint(spread, CASES[1], (515, 515))
    shape = Shape(1, 4, 4, 1024, 1024)
    inputs = draw(plain.plan, shape, "cuda", 0, kind="outliers")
    errors = [
        judge(made.spec, made.plan, made(*inputs), None, *inputs).input_rmse for made in (plain, spread)
    ]
    assert errors[0] is not None and errors[1] is not None and errors[1] < errors[0]


@pytest.mark.parametrize("scales", SCALE_KINDS)
def test_ways_to_pass_operands_agree(scales: str) -> None:
    """16-bit tensors, operands, and e4m3 rows with descales give the same bits; so do both layouts."""
    made = attngen.compile(spec_of(dim=128, scales=scales))
    q, k, v = draw(made.plan, Shape(2, 4, 2, 200, 333), "cuda", 1)
    expected, lse = made(q, k, v, return_lse=True)
    operands = made.quantize(q, k, v)
    out, again = made(operands, return_lse=True)
    assert torch.equal(out, expected) and torch.equal(lse, again)
    descales = {name: getattr(operands, name) for name in ("q_descale", "k_descale", "v_descale")}
    rows = unpack_values(operands.v, operands.seqlen_k)
    assert torch.equal(made(operands.q, operands.k, rows, **descales), expected)
    turned = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    assert torch.equal(made(*turned, layout="bhsd").transpose(1, 2), expected)


def test_what_spoils_a_row_spoils_it_alone() -> None:
    """A NaN in Q makes its row NaN; an infinity ends at the largest of its block; rows that see nothing are 0."""
    made = attngen.compile(spec_of(dim=128))
    q, k, v = draw(made.plan, Shape(1, 2, 2, 300, 200), "cuda", 1)
    right, right_lse = made(q, k, v, return_lse=True)
    assert bool((right[:, :100] == 0).all()) and bool(right_lse[:, :, :100].isneginf().all())
    q[0, 250, 1, 7] = float("nan")
    out, lse = made(q, k, v, return_lse=True)
    spoilt = torch.zeros(2, 300, dtype=torch.bool, device="cuda")
    spoilt[1, 250] = True
    assert torch.equal(lse[0].isnan(), spoilt) and torch.equal(out[0].isnan().all(-1), spoilt.T)
    q[0, 250, 1, 7] = float("inf")
    assert bool(made(q, k, v).isfinite().all())


def test_captured_calls_quantise_anew() -> None:
    """A graph replays on whatever its tensors then hold, quantisation included."""
    made = attngen.compile(spec_of(dim=128))
    q, k, v = draw(made.plan, Shape(1, 2, 2, 257, 257), "cuda", 1)
    made(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = made(q, k, v)
    for seed in (2, 3):
        fresh = draw(made.plan, Shape(1, 2, 2, 257, 257), "cuda", seed)
        for old, new in zip((q, k, v), fresh, strict=True):
            old.copy_(new)
        out.zero_()
        graph.replay()
        wait_for_gpu()
        assert torch.equal(out, made(*fresh))


def test_gpu_and_simulator_quantise_alike() -> None:
    """The same bytes and scales, and outputs that differ by roundings of P alone."""
    made = attngen.compile(spec_of(dim=64, incoherent="hadamard"))
    inputs = draw(made.plan, Shape(1, 2, 1, 150, 210), "cuda", 1)
    ours, theirs = made.quantize(*inputs), made.quantize(*(x.cpu() for x in inputs))
    for name in ("q", "k", "v"):
        assert torch.equal(
            getattr(ours, name).cpu().view(torch.uint8), getattr(theirs, name).view(torch.uint8)
        )
    out, simulated = made(ours).cpu().float(), made(theirs).float()
    assert (out - simulated).abs().max() < 0.05 * simulated.abs().max()
