"""Gradients on a GPU: within the rule, the same bits in every run, captured, and of no more memory than they say."""

import gc

import pytest
import torch

import attngen
from attngen.arch import arch_for_capability
from tests.gradients.backward_cases import CASES, MASKS, SCORES, BackwardCase
from tests.gradients.declared_cases import CASES as DECLARED
from tests.gradients.declared_cases import PAIRS, DeclaredCase, everything

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]

LENGTHS = ((113, 203), (128, 217), (239, 1), (799, 3), (1023, 1024), (1024, 1023))
WIDE = (
    *(
        BackwardCase(mask, lengths=lengths, heads=(6, 2))
        for mask in ("full", "causal")
        for lengths in LENGTHS
    ),
    *(
        BackwardCase(mask, score, (257, 385), (6, 2), (dim, dim), inputs)
        for dim in (32, 40, 64, 96, 128, 160, 192, 256)
        for mask, score in (("causal", "score"), ("causal and document(doc)", "softcap(score, 3.0)"))
        for inputs in ("bf16", "f16")
    ),
    *(
        BackwardCase("causal", lengths=(300, 300), heads=heads, head_dim=(64, 64))
        for heads in ((3, 3), (8, 1))
    ),
    *(BackwardCase("causal", lengths=(300, 300), head_dim=dims) for dims in ((192, 128), (64, 32))),
    *(BackwardCase(mask, score, (200, 200), (4, 2), (64, 64)) for mask in MASKS for score in SCORES),
)


def target() -> str:
    return arch_for_capability(torch.cuda.get_device_capability()).name


def gradients(case: BackwardCase, kernel: attngen.Kernel) -> tuple:
    """Inputs, declared tensors, out, lse and the gradients of a case."""
    drawn, declared = case.inputs_on("cuda")
    q, k, v, dout = drawn
    out, lse = kernel(q, k, v, case.scale, return_lse=True, **declared)
    return (
        drawn,
        declared,
        out,
        lse,
        kernel.backward(dout, q, k, v, out, lse, softmax_scale=case.scale, **declared),
    )


@pytest.mark.parametrize("case", (*CASES, *WIDE), ids=str)
def test_gradients_are_within_the_rule(case: BackwardCase) -> None:
    """Every head_dim, mask, score and length, against fp64."""
    drawn, declared, out, lse, got = gradients(case, case.kernel(target()))
    verdict = case.verdict(got, drawn, declared, out=out, lse=lse)
    assert verdict.ok, verdict.failures


@pytest.mark.parametrize(
    "case", [WIDE[1], WIDE[-1], BackwardCase("causal", lengths=(300, 300), head_dim=(256, 256))], ids=str
)
def test_the_same_bits_come_out_in_every_run(case: BackwardCase) -> None:
    """Fifty runs, under whatever else the GPU does: each gradient has one owner, who adds in one order."""
    kernel = case.kernel(target())
    drawn, declared, out, lse, first = gradients(case, kernel)
    q, k, v, dout = drawn
    for _ in range(50):
        again = kernel.backward(dout, q, k, v, out, lse, **declared)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_autograd_and_graphs_run_the_same_kernels() -> None:
    """A training step by autograd, alone and replayed from a CUDA graph, has the bits of `Kernel.backward`."""
    case = BackwardCase("causal", lengths=(300, 300), heads=(4, 2), head_dim=(64, 64))
    kernel = case.kernel(target())
    drawn, _, out, lse, expected = gradients(case, kernel)
    q, k, v, dout = drawn
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    got = torch.autograd.grad(kernel(*leaves), leaves, dout)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = kernel.backward(dout, q, k, v, out, lse)
    for x in replayed:
        x.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(replayed, expected, strict=True))


def requested(when: str) -> int:
    """Bytes asked of torch's allocator, which may give more; from then on the peak is that of what follows."""
    gc.collect()  # what earlier tests left in cycles would be given back in between
    torch.cuda.synchronize()
    found = torch.cuda.memory_stats()[f"requested_bytes.all.{when}"]
    torch.cuda.reset_peak_memory_stats()
    return int(found)


def test_a_pass_allocates_its_gradients_and_two_rows() -> None:
    """Beside dQ, dK and dV there are D and lse in log2 units, of f32 a row each."""
    case = BackwardCase("causal", lengths=(512, 512), heads=(4, 4), head_dim=(32, 32))
    kernel = case.kernel(target())
    drawn, _, out, lse, got = gradients(case, kernel)
    q, k, v, dout = drawn
    del got
    before = requested("current")
    got = kernel.backward(dout, q, k, v, out, lse)
    peak = requested("peak") - before
    assert peak == sum(x.numel() * 2 for x in got) + 2 * 4 * lse.numel()


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qk", "qv", "kv"])
@pytest.mark.parametrize("head_dim", [32, 192])
@pytest.mark.parametrize("kind", ["auto", "fa2"])
def test_what_requires_no_grad_takes_no_memory(kind: str, head_dim: int, wanted: str) -> None:
    """By autograd: gradients of what requires grad have the bits that they have beside the others."""
    spec = {"schedule": {"kind": kind}}
    case = BackwardCase("causal", lengths=(512, 512), heads=(4, 4), head_dim=(head_dim, head_dim), spec=spec)
    kernel = case.kernel(target())
    drawn, _, _, lse, every = gradients(case, kernel)
    *inputs, dout = drawn
    leaves = [x.requires_grad_() for name, x in zip("qkv", inputs, strict=True) if name in wanted]
    out = kernel(*inputs)
    before = requested("current")
    got = torch.autograd.grad(out, leaves, dout)
    peak = requested("peak") - before
    assert peak == sum(x.numel() * 2 for x in got) + 2 * 4 * lse.numel()
    expected = [x for name, x in zip("qkv", every, strict=True) if name in wanted]
    assert all(torch.equal(x, y) and x.any() for x, y in zip(got, expected, strict=True))


@pytest.mark.parametrize("how", ["sum", "transposed", "sliced"])
def test_strides_of_dout_are_read(how: str) -> None:
    """dO of a sum, of a transpose and of a slice with far rows gives what a dense one does."""
    case = BackwardCase("causal", lengths=(130, 130), heads=(4, 2), head_dim=(64, 64))
    kernel = case.kernel(target())
    drawn, _, out, lse, _ = gradients(case, kernel)
    q, k, v, dout = drawn
    if how == "sum":
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        got = torch.autograd.grad(kernel(*leaves).sum(), leaves)
        dense = torch.ones_like(dout)
    elif how == "transposed":
        dense = dout
        got = kernel.backward(dout.transpose(1, 2).contiguous().transpose(1, 2), q, k, v, out, lse)
    else:
        far = torch.zeros(2, 130, 4, 2**12, device="cuda", dtype=dout.dtype)
        far[..., :64] = dout
        dense, got = dout, kernel.backward(far[..., :64], q, k, v, out, lse)
    for x, y in zip(got, kernel.backward(dense, q, k, v, out, lse), strict=True):
        assert torch.equal(x, y)


FUSED = (
    *(
        BackwardCase(mask, lengths=lengths, heads=heads, head_dim=(dim, dim), spec={"deterministic": False})
        for dim in (64, 128)
        for mask, heads in (("full", (2, 2)), ("causal", (6, 2)), ("window(200, 60)", (4, 1)))
        for lengths in (
            (1, 1),
            (64, 64),
            (203, 203),
            (113, 203),
            (512, 256),
            (256, 512),
            (1023, 1024),
            (2048, 2048),
        )
    ),
    BackwardCase(
        "causal", lengths=(300, 300), inputs="f16", head_dim=(128, 128), spec={"deterministic": False}
    ),
    BackwardCase(
        "window(20 * (h + 1), 0)",
        lengths=(300, 300),
        heads=(4, 1),
        head_dim=(64, 64),
        spec={"deterministic": False},
    ),
)
"""Cases of the kernel that adds dQ up in device memory."""


@pytest.mark.parametrize("case", FUSED, ids=str)
def test_sums_of_dq_are_within_the_rule_in_any_order(case: BackwardCase) -> None:
    """Ten runs on memory that others have used: dK and dV are the same bits, dQ is right each time."""
    kernel = case.kernel(target())
    assert [plan.schedule for plan in kernel.call.gradients] == ["fused_gradients"]
    drawn, declared, out, lse, first = gradients(case, kernel)
    q, k, v, dout = drawn
    verdict = case.verdict(first, drawn, declared, out=out, lse=lse)
    assert verdict.ok, verdict.failures
    for _ in range(10):
        torch.full((first[0].numel() * 4,), float("nan"), device="cuda")  # freed at once, to be found again
        again = kernel.backward(dout, q, k, v, out, lse, **declared)
        assert all(torch.equal(x, y) for x, y in zip(first[1:], again[1:], strict=True))
        torch.testing.assert_close(again[0], first[0], rtol=2.0**-6, atol=1e-3)


@pytest.mark.parametrize("length", [128, 203, 1000, 2048, 4096])
@pytest.mark.parametrize(
    ("mask", "heads"), [("full", (2, 2)), ("causal", (6, 2)), ("window(200, 60)", (4, 1))]
)
@pytest.mark.parametrize(("head_dim", "score"), [(64, "score"), (128, "score"), (96, "softcap(score, 3.0)")])
def test_sums_of_dq_in_one_order_are_the_same_bits(
    head_dim: int, score: str, mask: str, heads: tuple[int, int], length: int
) -> None:
    """Twenty runs of the fused kernel on memory that others have used, against the reference and the first."""
    case = BackwardCase(mask, score, (length, length), heads, (head_dim, head_dim))
    kernel = case.kernel(target())
    assert [bool(plan.query_ranks) for plan in kernel.call.gradients] == [True]
    drawn, declared, out, lse, first = gradients(case, kernel)
    q, k, v, dout = drawn
    verdict = case.verdict(first, drawn, declared, out=out, lse=lse)
    assert verdict.ok, verdict.failures
    for _ in range(20):
        torch.full((first[0].numel() * 4,), float("nan"), device="cuda")  # freed at once, to be found again
        again = kernel.backward(dout, q, k, v, out, lse, **declared)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize(
    "case",
    [
        *(
            BackwardCase(mask, score, lengths, (6, 2), (96, 96), spec={"deterministic": False})
            for mask in ("full", "causal", "window(200, 60)")
            for lengths in ((1, 1), (203, 203), (512, 256), (2048, 2048))
            for score in ("score", "score + alibi(slopes)", "softcap(score, 3.0)")
        ),
        *(
            BackwardCase(
                "causal",
                "score + alibi(slopes)",
                (300, 300),
                (4, 2),
                (128, 128),
                spec={"deterministic": deterministic, "gradients": ["q", "k", "v", "slopes"]},
            )
            for deterministic in (False, True)
        ),
    ],
    ids=str,
)
def test_wider_sums_and_what_is_declared_are_within_the_rule(case: BackwardCase) -> None:
    """Heads of 96 columns, and gradients of what is declared beside the fused kernel's."""
    kernel = case.kernel(target())
    assert kernel.call.gradients[0].schedule == "fused_gradients"
    drawn, declared, out, lse, got = gradients(case, kernel)
    verdict = case.verdict(got[:3], drawn, declared, out=out, lse=lse)
    assert verdict.ok, verdict.failures
    assert all(x.isfinite().all() for x in got)


@pytest.mark.parametrize("deterministic", [False, True])
def test_sums_of_dq_are_allocated_beside_the_gradients(deterministic: bool) -> None:
    """A row of f32 for each row of queries, in whole blocks, D and lse in log2 units, and counts for an order."""
    case = BackwardCase(
        "causal", lengths=(512, 512), heads=(4, 4), head_dim=(64, 64), spec={"deterministic": deterministic}
    )
    kernel = case.kernel(target())
    drawn, _, out, lse, got = gradients(case, kernel)
    q, k, v, dout = drawn
    del got
    before = requested("current")
    got = kernel.backward(dout, q, k, v, out, lse)
    peak = requested("peak") - before
    counts = 4 * 2 * lse.numel() // 128 if deterministic else 0  # of blocks of 128 rows, for two warpgroups
    assert peak == sum(x.numel() * 2 for x in got) + 4 * q.numel() + 2 * 4 * lse.numel() + counts


EVERYTHING = (
    *(
        everything(dim, inputs, mask, (257, 385), (6, 2))
        for dim in (32, 64, 96, 128, 192, 256)
        for inputs, mask in (("bf16", "causal"), ("f16", "causal and document(doc)"))
    ),
    *(everything(64, "bf16", "causal", lengths, (4, 4)) for lengths in LENGTHS),
    everything(128, "bf16", "window(100, 30)", (300, 300), (8, 1)),
)
"""Cases with gradients of all that a spec may declare at once."""


def declared_gradients(case: DeclaredCase, kernel: attngen.Kernel) -> tuple:
    """Inputs, what is declared, out, lse and all gradients of a case."""
    drawn, declared = case.inputs_on("cuda")
    q, k, v, dout = drawn
    out, lse = kernel(q, k, v, return_lse=True, **declared)
    return drawn, declared, out, lse, kernel.backward(dout, q, k, v, out, lse, **declared)


@pytest.mark.parametrize("case", (*DECLARED, *EVERYTHING), ids=str)
def test_gradients_of_what_is_declared_are_within_the_rule(case: DeclaredCase) -> None:
    """Of every class of owners, head_dim and length, against fp64."""
    drawn, declared, out, lse, got = declared_gradients(case, case.kernel(target()))
    verdict = case.verdict(got, drawn, declared, out=out, lse=lse)
    assert verdict.ok, f"{verdict.failures}\n{verdict}"


@pytest.mark.parametrize("case", [EVERYTHING[2], EVERYTHING[7], EVERYTHING[-1]], ids=str)
def test_gradients_of_what_is_declared_are_the_same_bits_in_every_run(case: DeclaredCase) -> None:
    """Fifty runs: sums over batches, heads, rows and threads have one order."""
    kernel = case.kernel(target())
    drawn, declared, out, lse, first = declared_gradients(case, kernel)
    q, k, v, dout = drawn
    for _ in range(50):
        again = kernel.backward(dout, q, k, v, out, lse, **declared)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_autograd_hands_gradients_to_what_is_declared() -> None:
    """By the call, with a scalar on the CPU and a bias that is transposed, and by `attngen.attention`."""
    case = EVERYTHING[2]
    kernel = case.kernel(target())
    drawn, declared, _, _, expected = declared_gradients(case, kernel)
    turned = declared | {"bias": declared["bias"].mT.contiguous().mT, "cap": torch.tensor(declared["cap"])}
    leaves = {name: x.detach().requires_grad_() for name, x in turned.items()}
    inputs = [x.detach().requires_grad_() for x in drawn[:3]]
    wanted = [*inputs, *(leaves[name] for name in case.wanted)]
    got = torch.autograd.grad(kernel(*inputs, **leaves), wanted, drawn[3])
    assert all(torch.equal(x.to(y), y) for x, y in zip(got, expected, strict=True))
    assert [x.device for x in got] == [x.device for x in wanted]
    tensors = {name: text for name, (text, _) in case.tensors.items()}
    out = attngen.attention(*inputs, case.mask, case.score, tensors=tensors, scalars={"cap": "f32"}, **leaves)
    again = torch.autograd.grad(out, wanted, drawn[3])
    assert all(torch.equal(x, y) for x, y in zip(got, again, strict=True))


def test_elements_that_no_pair_reads_are_0_in_dirty_memory() -> None:
    """A bias that is longer than its indices: what they do not come to is written, captured in a graph too."""
    case = PAIRS[5]
    kernel = case.kernel(target())
    drawn, declared, out, lse, first = declared_gradients(case, kernel)
    q, k, v, dout = drawn
    size = first[3].numel()
    for _ in range(4):
        junk = torch.full((size,), float("nan"), device="cuda")
        del junk
        got = kernel.backward(dout, q, k, v, out, lse, **declared)[3]
        assert (
            torch.equal(got, first[3])
            and not got[:, 0].any()
            and not got[70:].any()
            and not got[..., 130:].any()
        )
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = kernel.backward(dout, q, k, v, out, lse, **declared)
    for x in replayed:
        x.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(replayed, first, strict=True))
