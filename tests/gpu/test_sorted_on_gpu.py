"""Masks on sorted tensors on a GPU: boundaries, values and gradients, tables, graphs, and values that do fall."""

from typing import Any

import pytest
import torch
from gpu_kernels import KINDS, captured, compile_specs, counters_are_zero, skip_unless_runs_here, wait_for_gpu

import attngen
from attngen.arch import arch_for_capability
from attngen.check.declared_inputs import declared_inputs
from attngen.check.inputs import Shape, random_inputs
from attngen.check.judging import judge, judge_gradients
from attngen.expr import find_boundaries

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

TENSORS = {"doc": "i32[batch, seqlen_k] sorted", "kinds": "u8[batch, seqlen_q] sorted"}
MASKS = (
    "document(doc)",
    "causal and document(doc)",
    "window(100, 20) and document(doc)",
    "doc[b, kv_idx] <= doc[b, q_pos] and doc[b, kv_idx] > doc[b, q_pos] - 2",
    "doc[b, kv_idx] == kinds[b, q_idx]",
    "document(doc) and kv_idx <= 2 * q_idx",
)
LENGTHS = ((257, 300), (1, 1), (300, 129), (513, 513), (0, 3), (3, 0), (2050, 2050))


def spec_of(mask: str, kind: str = "auto", dim: int = 64, *, gradients: bool = False) -> dict[str, Any]:
    return {
        "problem": {"head_dim": dim},
        "tensors": {name: text for name, text in TENSORS.items() if name in mask},
        "mask": mask,
        "schedule": {"kind": kind},
        **({"gradients": ["q", "k", "v"]} if gradients else {}),
    }


Call = tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], dict[str, Any]]


def call_of(made: attngen.Kernel, lengths: tuple[int, int], seed: int = 0) -> Call:
    """Tensors of a call with 16 documents at most, of any length, other ones for each seed."""
    shape, dim = Shape(2, 4, 2, *lengths), made.plan.head_dim_qk
    drawn = random_inputs(shape, dim, dim, torch.bfloat16, "cuda", seed)
    return drawn, declared_inputs(made.spec.declarations, shape, "cuda", seed)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_within_the_rule(kind: str) -> None:
    """Every mask, of lengths beside the tiles, of no key and of no row; a tensor of documents of one key each too."""
    skip_unless_runs_here(kind)
    bad = []
    for made in compile_specs([spec_of(mask, kind) for mask in MASKS]):
        for lengths in LENGTHS:
            for seed in (0, 1):
                (q, k, v), declared = call_of(made, lengths, seed)
                if seed and lengths[1]:
                    declared["doc"] = torch.arange(lengths[1], device="cuda").expand(2, -1).int()
                out, lse = made(q, k, v, return_lse=True, **declared)
                wait_for_gpu()
                verdict = judge(made.spec, made.plan, out, lse, q, k, v, declared=declared)
                if not verdict.ok:
                    bad.append(f"{made.spec.mask}, {lengths}, {seed}: {verdict}")
    assert not bad, "\n".join(bad)
    assert counters_are_zero()


@pytest.mark.parametrize("dim", [64, 128, 192, 256])
def test_gradients_are_within_the_rule(dim: int) -> None:
    """Both kernels of the pass, with the tiles that auto picks; the same bits in a second run."""
    for made in compile_specs([spec_of(mask, "auto", dim, gradients=True) for mask in MASKS]):
        for lengths in ((257, 300), (300, 129), (1030, 1030)):
            (q, k, v), declared = call_of(made, lengths)
            out, lse = made(q, k, v, return_lse=True, **declared)
            dout = random_inputs(Shape(2, 4, 2, *lengths), dim, dim, torch.bfloat16, "cuda", 9)[0]
            found, again = (made.backward(dout, q, k, v, out, lse, **declared) for _ in range(2))
            wait_for_gpu()
            assert all(map(torch.equal, found, again))
            verdict = judge_gradients(made.spec, found, (q, k, v), dout, out, lse, declared=declared)
            assert verdict.ok, f"{made.spec.mask}, {lengths}: {verdict}"


def test_boundaries_are_what_torch_finds() -> None:
    """Each element, of tables that a call keeps; of values that fall as well."""
    made = attngen.compile(spec_of("doc[b, kv_idx] == kinds[b, q_idx]"))
    for seed, lengths in enumerate(((257, 300), (3000, 70), (5, 0))):
        (q, k, v), declared = call_of(made, lengths, seed)
        for passed in (declared, {name: x.flip(-1).contiguous() for name, x in declared.items()}):
            tables = made.tables(q, k, v, **passed)
            sizes = {
                "batch": 2,
                "seqlen_q": lengths[0],
                "seqlen_k": lengths[1],
                "num_heads_q": 4,
                "num_heads_kv": 2,
            }
            on_cpu = {name: x.cpu() for name, x in passed.items()}
            expected = find_boundaries(made.plan.boundaries, sizes, {}, on_cpu)
            memory = tables.memory.cpu().view(torch.int32)
            start = 0
            for boundary in made.plan.boundaries:
                wanted = expected[boundary.name].flatten()
                assert torch.equal(memory[start : start + len(wanted)], wanted)
                start += -(-len(wanted) // 64) * 64  # values begin on 256 bytes
            out = made(q, k, v, **passed)
            assert torch.equal(made(q, k, v, tables=tables, **passed), out)


@pytest.mark.parametrize("kind", KINDS)
def test_the_unsorted_spec_says_the_same(kind: str) -> None:
    """The walk of the spec without the word is as right, and both see the same pairs: outputs differ by roundings."""
    skip_unless_runs_here(kind)
    for mask in MASKS[:2]:
        plain = spec_of(mask, kind)
        plain["tensors"] = {name: text.removesuffix(" sorted") for name, text in plain["tensors"].items()}
        ours, theirs = compile_specs([spec_of(mask, kind), plain])
        (q, k, v), declared = call_of(ours, (1500, 1500))
        (out, lse), (other, other_lse) = (
            made(q, k, v, return_lse=True, **declared) for made in (ours, theirs)
        )
        wait_for_gpu()
        assert torch.allclose(out.float(), other.float(), rtol=0.02, atol=0.02)
        assert torch.allclose(lse, other_lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_values_that_fall_end_and_stay_finite(kind: str) -> None:
    """No hang and no access out of bounds (compute-sanitizer runs this too); verify names the place."""
    skip_unless_runs_here(kind)
    made = attngen.compile(spec_of("causal and document(doc)", kind))
    (q, k, v), declared = call_of(made, (700, 700))
    made.verify(q, k, v, **declared)
    for seed in range(5):
        random = torch.Generator("cuda").manual_seed(seed)
        doc = torch.randint(-(2**31), 2**31 - 1, (2, 700), generator=random, device="cuda").int()
        out = made(q, k, v, doc=doc)
        wait_for_gpu()
        assert out.isfinite().all()
        with pytest.raises(attngen.ArgumentError, match="argument doc: got"):
            made.verify(q, k, v, doc=doc)


def test_a_graph_finds_its_boundaries_anew() -> None:
    """A captured call, both passes, replays on whatever the tensor then holds."""
    made = attngen.compile(spec_of("causal and document(doc)", gradients=True), arch=target())
    (q, k, v), declared = call_of(made, (513, 513))
    doc = declared["doc"]

    def both() -> torch.Tensor:
        out, lse = made(q, k, v, return_lse=True, doc=doc)
        return torch.cat([out, *made.backward(out, q, k, v, out, lse, doc=doc)], 2)

    both()
    graph, found = captured(both)
    results = []
    for cuts in (3, 40):
        doc.copy_(torch.arange(513, device="cuda") // cuts)
        graph.replay()
        wait_for_gpu()
        results.append(found.clone())
        assert torch.equal(found, both())
    assert not torch.equal(*results)


def target() -> str:
    return arch_for_capability(torch.cuda.get_device_capability()).name
