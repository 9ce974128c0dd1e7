"""Walks, modified scores, declared values and tables of extremes on a GPU, against the fp64 reference."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from gpu_kernels import (
    KINDS,
    WARPGROUP_KINDS,
    captured,
    compile_specs,
    counters_are_zero,
    skip_unless_runs_here,
    wait_for_gpu,
)

import attngen
from attngen.check.accuracy import compare
from attngen.check.inputs import Shape, random_inputs
from attngen.check.reference import attention
from tests.check.language_cases import CASES, WINDOW_AND_SINKS, LanguageCase

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

LENGTHS = ((257, 300), (1, 1), (64, 1000), (300, 129), (513, 513), (0, 3), (3, 0))
SUBSET = (
    LanguageCase("window(100, 0) or sinks(4)", "softcap(score, 2.0)"),
    LanguageCase("causal", "softcap(score, 30.0) + alibi(slopes)"),
    LanguageCase("document(doc) and causal"),
    LanguageCase("causal", "score + alibi(slopes)"),
    LanguageCase("allow[h, q_idx, kv_idx]", "score + bias[h, q_idx, kv_idx]"),
)
DOCUMENT = LanguageCase("document(doc)", "score + alibi(slopes)")


def spec_of(
    case: LanguageCase, kind: str, dim: int = 64, inputs: str = "bf16", **schedule: Any
) -> dict[str, Any]:
    return case.spec(
        problem={"head_dim": dim}, precision={"inputs": inputs}, schedule={"kind": kind, **schedule}
    )


def kernel(case: LanguageCase, kind: str) -> attngen.Kernel:
    skip_unless_runs_here(kind)
    return attngen.compile(spec_of(case, kind))


Call = tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], dict[str, Any]]


def call_of(case: LanguageCase, lengths: tuple[int, int], seed: int = 0) -> Call:
    """Tensors of a call and what it passes by name; of another seed every document begins elsewhere."""
    shape = Shape(2, 4, 2, *lengths)
    declared = case.arguments(shape, "cuda")
    if "doc" in declared:
        declared["doc"].copy_(torch.arange(lengths[1]) // (40 + 50 * seed))
    return random_inputs(shape, 64, 64, torch.bfloat16, "cuda", seed), declared


@pytest.mark.parametrize("kind", KINDS)
def test_the_language_is_right(kind: str) -> None:
    """Every mask and score of the tests, for lengths beside the tiles, of no key and of no row."""
    skip_unless_runs_here(kind)
    made, bad = compile_specs([spec_of(case, kind) for case in CASES]), []
    for case, each in zip(CASES, made, strict=True):
        for lengths in LENGTHS:
            accuracy = case.judge(each, Shape(2, 4, 2, *lengths), "cuda")
            if not accuracy.ok:
                bad.append(f"{case}, {lengths}: {accuracy}")
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize("kind", ["fa2", *WARPGROUP_KINDS])
def test_other_head_dims_are_right(kind: str, dim: int) -> None:
    """The same with the tiles of larger heads, in f16."""
    skip_unless_runs_here(kind)
    made = compile_specs([spec_of(case, kind, dim, "f16") for case in SUBSET])
    for case, each in zip(SUBSET, made, strict=True):
        for lengths in ((257, 300), (300, 129), (513, 1025)):
            accuracy = case.judge(each, Shape(2, 4, 2, *lengths), "cuda")
            assert accuracy.ok, f"{case}, {lengths}: {accuracy}"


@pytest.mark.parametrize("kind", WARPGROUP_KINDS)
def test_variants_of_a_schedule_walk_alike(kind: str) -> None:
    """With and without overlap, drawn and launched tiles: right, and persistence changes no bit."""
    skip_unless_runs_here(kind)
    fields = [{"overlap": overlap, "persistent": way} for overlap in (True, False) for way in (True, False)]
    for case in SUBSET:
        made = compile_specs([spec_of(case, kind, **schedule) for schedule in fields])
        for lengths in ((257, 300), (700, 700)):
            (q, k, v), declared = call_of(case, lengths)
            outs = [each(q, k, v, **declared) for each in made]
            assert torch.equal(outs[0], outs[1]) and torch.equal(outs[2], outs[3]), f"{case}, {lengths}"
            for each in made[::2]:
                accuracy = case.judge(each, Shape(2, 4, 2, *lengths), "cuda")
                assert accuracy.ok, f"{case}, {lengths}: {accuracy}"
    assert counters_are_zero()


@pytest.mark.parametrize("kind", KINDS)
def test_strides_of_declared_tensors_are_theirs(kind: str) -> None:
    """A slice, a transpose and a repeated tensor give the bits of their copies, whatever lies around them."""
    case = LanguageCase("document(doc)", "score + bias[h, q_idx, kv_idx]")
    made = kernel(case, kind)
    (q, k, v), declared = call_of(case, (257, 300))
    doc, bias = declared["doc"], declared["bias"]
    expected = made(q, k, v, doc=doc, bias=bias)
    around = torch.full((4, 3 * 300 + 7), 77, dtype=torch.int32, device="cuda")
    sliced = around[1:3, 5 : 5 + 3 * 300 : 3].copy_(doc)
    turned = torch.full((301, 258, 5), float("nan"), dtype=torch.bfloat16, device="cuda")
    turned = turned[:300, :257, :4].permute(2, 1, 0).copy_(bias)
    assert torch.equal(made(q, k, v, doc=sliced, bias=turned), expected)
    repeated = bias[:, :1].expand(4, 257, 300)
    assert torch.equal(
        made(q, k, v, doc=doc, bias=repeated), made(q, k, v, doc=doc, bias=repeated.contiguous())
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_that_is_no_number_spoils_its_row_alone(kind: str) -> None:
    """A bias of NaN or +inf at a visible pair makes that row NaN, out and lse, and at a hidden pair nothing."""
    case = LanguageCase(WINDOW_AND_SINKS, "score + bias[h, q_idx, kv_idx]")
    made = kernel(case, kind)
    (q, k, v), declared = call_of(case, (300, 300))
    right, right_lse = made(q, k, v, return_lse=True, **declared)
    bias = declared["bias"]
    bias[1, 200, 199], bias[2, 16, 1], bias[3, 299, 100] = float("nan"), float("inf"), float("nan")
    out, lse = made(q, k, v, return_lse=True, **declared)
    spoilt = torch.zeros(4, 300, dtype=torch.bool, device="cuda")
    spoilt[1, 200] = spoilt[2, 16] = True
    assert torch.equal(lse.isnan(), spoilt.expand(2, 4, 300))
    assert torch.equal(out.isnan().all(-1), spoilt.T.expand(2, 300, 4))
    assert torch.equal(lse[:, ~spoilt], right_lse[:, ~spoilt])
    assert torch.equal(out[:, ~spoilt.T], right[:, ~spoilt.T])


@pytest.mark.parametrize("kind", KINDS)
def test_infinite_products_are_capped(kind: str) -> None:
    """tanh of an infinity is 1, in a warp whose other products are near 0 too; of NaN it is NaN, in that row alone."""
    case = LanguageCase("causal", "softcap(score, 30.0)")
    made = kernel(case, kind)
    (q, k, v), _ = call_of(case, (300, 300))
    q *= 0.1
    q[0, 7, 1, 3], q[1, 90, 2, 5], q[1, 255, 3, 0] = float("inf"), float("nan"), float("-inf")
    out, lse = made(q, k, v, return_lse=True)
    right, right_lse = attention(q, k, v, made.spec.mask_expr, score=made.spec.score_expr)
    spoilt = torch.zeros(2, 4, 300, dtype=torch.bool, device="cuda")
    spoilt[1, 2, 90] = True
    assert torch.equal(lse.isnan(), spoilt) and torch.equal(right_lse.isnan(), spoilt)
    assert torch.equal(out.isnan().all(-1), spoilt.transpose(1, 2))
    assert (out - right)[~spoilt.transpose(1, 2)].abs().max() < 0.02
    assert (lse - right_lse)[~spoilt].abs().max() < 1e-3


SIZES = (
    ("softcap(score, 1000000.0)", {}),
    ("softcap(score, x)", {"x": 1e9}),
    ("10000000000.0 * tanh(score * 10000000.0)", {}),
    ("5.0 * tanh(score * (x + 1.0))", {"x": 0.5}),
    ("tanh(score * (x if x < 0.0 else 1.0))", {"x": -3.0}),
    ("exp(tanh(score * (f32(h) + 1.0)))", {}),
    ("score + 1000.0", {}),
    ("score - x * f32(kv_idx)", {"x": 0.5}),
    ("score + x * f32(kv_idx)", {"x": 0.5}),
)


@pytest.mark.parametrize("kind", WARPGROUP_KINDS)
def test_caps_multiples_and_terms_of_any_size(kind: str) -> None:
    """A cap that bends nothing, one that cuts at once, multiples that are sums, and terms larger than all products."""
    skip_unless_runs_here(kind)
    specs = [
        {
            "problem": {"head_dim": 128},
            "mask": "causal",
            "score": score,
            "scalars": dict.fromkeys(passed, "f32"),
            "schedule": {"kind": kind},
        }
        for score, passed in SIZES
    ]
    q, k, v = random_inputs(Shape(2, 4, 2, 300, 1500), 128, 128, torch.bfloat16, "cuda", 5)
    q[0, 7], q[1, 130] = 0, 4 * q[1, 130]
    bad = []
    for made, (score, passed) in zip(compile_specs(specs), SIZES, strict=True):
        out, lse = made(q, k, v, return_lse=True, **passed)
        about = {"score": made.spec.score_expr, "declared": passed}
        accuracy = compare(out, lse, q, k, v, made.spec.mask_expr, **about)
        if not accuracy.ok:
            bad.append(f"{score}: {accuracy}")
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("kind", WARPGROUP_KINDS)
def test_tables_of_calls_at_the_same_time(kind: str) -> None:
    """Memory of tables is kept for each thread and stream: threads on one stream and on their own, a graph beside."""
    made = kernel(DOCUMENT, kind)
    (q, k, v), declared = call_of(DOCUMENT, (1030, 1030))
    keys = torch.arange(1030, device="cuda").expand_as(declared["doc"])
    passed = [declared | {"doc": (keys // (100 + 90 * i)).int()} for i in range(4)]
    expected = [made(q, k, v, tables=made.tables(q, k, v, **each), **each) for each in passed]
    graph, of_graph = captured(lambda: made(q, k, v, **passed[0]))
    torch.cuda.synchronize()

    def work(i: int) -> bool:
        same = True
        for turn in range(30):
            with torch.cuda.stream(torch.cuda.Stream() if turn % 2 else torch.cuda.default_stream()):
                same &= torch.equal(made(q, k, v, **passed[i]), expected[i])
        return same

    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(work, i) for i in range(4)]
        for _ in range(30):
            graph.replay()
        assert all(each.result() for each in waiting)
    torch.cuda.synchronize()
    assert torch.equal(of_graph, expected[0])


@pytest.mark.parametrize("kind", KINDS)
def test_graph_replay_fills_its_tables_anew(kind: str) -> None:
    """A captured call replays on whatever the declared tensors then hold, tables of extremes included."""
    made = kernel(DOCUMENT, kind)
    (q, k, v), declared = call_of(DOCUMENT, (513, 513))
    made(q, k, v, **declared)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = made(q, k, v, return_lse=True, **declared)
    results = []
    for seed in (1, 3):
        inputs, passed = call_of(DOCUMENT, (513, 513), seed)
        for old, new in zip((q, k, v), inputs, strict=True):
            old.copy_(new)
        for name, tensor in declared.items():
            tensor.copy_(passed[name])
        out.zero_()
        graph.replay()
        graph.replay()
        wait_for_gpu()
        right, right_lse = made(*inputs, return_lse=True, **passed)
        assert torch.equal(out, right) and torch.equal(lse, right_lse)
        results.append(out.clone())
    assert not torch.equal(*results)
    assert counters_are_zero()


@pytest.mark.parametrize("kind", KINDS)
def test_two_streams_have_tables_of_their_own(kind: str) -> None:
    """Calls with other documents at once, on two streams, give what each gives alone."""
    made = kernel(DOCUMENT, kind)
    calls = (call_of(DOCUMENT, (513, 513), 1), call_of(DOCUMENT, (300, 1000), 2))
    expected = [made(*inputs, **declared) for inputs, declared in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    outs: tuple[list[torch.Tensor], ...] = ([], [])
    for _ in range(100):
        for stream, (inputs, declared), found in zip(streams, calls, outs, strict=True):
            with torch.cuda.stream(stream):
                found.append(made(*inputs, **declared))
    for stream in streams:
        torch.cuda.current_stream().wait_stream(stream)
    wait_for_gpu()
    for found, right in zip(outs, expected, strict=True):
        assert bool((torch.stack(found) == right).all())
    assert counters_are_zero()


@pytest.mark.parametrize("kind", KINDS)
def test_scalars_change_from_call_to_call(kind: str) -> None:
    """Each call has its own scalars: a reach and a cap change what the same kernel computes, and come back."""
    case = LanguageCase("kv_idx <= q_pos + reach", "softcap(score, cap)")
    made = kernel(case, kind)
    (q, k, v), _ = call_of(case, (257, 300))
    given = ({"reach": 0, "cap": 1.5}, {"reach": 40, "cap": 1.5}, {"reach": 0, "cap": 0.5}, {"reach": 0})
    outs = [made(q, k, v, **scalars) for scalars in given]
    assert all(not torch.equal(a, b) for i, a in enumerate(outs) for b in outs[:i])
    for scalars, out in zip(given, outs, strict=True):
        assert torch.equal(made(q, k, v, **scalars), out)
        plain = attngen.compile(
            {
                "problem": {"head_dim": 64},
                "mask": f"kv_idx <= q_pos + {scalars['reach']}",
                "score": f"softcap(score, {scalars.get('cap', 2.0)})",
                "schedule": {"kind": kind},
            }
        )
        assert torch.allclose(
            plain(q, k, v).float(), out.float(), rtol=0.02, atol=0.02
        )  # another rounding of S / cap


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_declared_values_leave_the_gpu_alone(kind: str) -> None:
    """A tensor on the CPU is an ArgumentError that names it; the kernel still runs after it."""
    made = kernel(DOCUMENT, kind)
    (q, k, v), declared = call_of(DOCUMENT, (257, 300))
    expected = made(q, k, v, **declared)
    with pytest.raises(attngen.ArgumentError, match="argument doc: .*device cpu"):
        made(q, k, v, **declared | {"doc": declared["doc"].cpu()})
    assert torch.equal(made(q, k, v, **declared), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_tables_of_one_call_serve_others(kind: str) -> None:
    """A call that is given tables computes the same, and fills none."""
    made = kernel(DOCUMENT, kind)
    tensors, declared = call_of(DOCUMENT, (300, 515))
    tables = made.tables(*tensors, **declared)
    before = tables.memory.clone()
    assert torch.equal(made(*tensors, **declared, tables=tables), made(*tensors, **declared))
    assert torch.equal(before.view(torch.uint8), tables.memory.view(torch.uint8))
