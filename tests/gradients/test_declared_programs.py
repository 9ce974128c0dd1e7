"""The programs of gradients of what is declared: every Step has a reason, and what is emitted compiles as planned."""

import re
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import attngen
from attngen.bind import Bound, bind, check_arguments
from attngen.plan import GRADIENTS_INTAKE, Call, KernelPlan
from attngen.runtime import disassemble
from attngen.simulate import SimulationFault
from attngen.simulate.launches import count, run_call
from tests.emit.sass import done_before_waiting
from tests.gradients.declared_cases import DeclaredCase
from tests.gradients.test_backward_programs import without_one

LENGTHS = ((20, 300), (300, 20), (200, 200))
"""Such that blocks of keys are seen by many blocks of queries, and by none; the shortest first, which notice most."""
WINDOW, WALKED = "window(130, 70)", "window(130, 70) and kv_idx % 2 != q_idx % 3"
READS = {
    "pair": ("bias[h_kv, q_idx, kv_idx]", "f32[num_heads_kv, m, n]"),
    "query": ("t[b, h, q_idx]", "f32[batch, num_heads_q, m]"),
    "key": ("u[h, kv_idx]", "f32[num_heads_q, n]"),
    "table": ("table[h, clamp(kv_idx - q_idx, -3, 3) + 3]", "f32[num_heads_q, 7]"),
    "any order": ("loose[kv_idx - q_idx + 20]", "f32[n]"),
}
"""A lookup and a declaration for each kind of owner; dimensions that a call binds are 300 long."""
LAST_OF_TWO = (
    "for each tile of this block: when tile has blocks: for n in n_full_begin - 1 .. n_min downwards (partial tiles): "
    "advance load_at"
)
"""On an edge of the mask lie blocks after the last of which nothing is loaded."""


def case_of(owner: str, mask: str, head_dim: int = 32) -> DeclaredCase:
    """softcap of the score and what is read, in heads that share keys, in two batches."""
    read, text = READS[owner]
    sizes = {"batch": 2, "num_heads_q": 2, "num_heads_kv": 1, "m": 300, "n": 300, "7": 7}
    shape = tuple(sizes[dim] for dim in text.partition("[")[2].rstrip("]").split(", "))
    name = read.partition("[")[0]
    return DeclaredCase(
        f"softcap(score + {read}, 3.0)",
        {name: (text, shape)},
        mask=mask,
        heads=(2, 1),
        head_dim=head_dim,
        spec={"deterministic": owner != "any order"},
    )


def given_gradient(case: DeclaredCase, kernel: attngen.Kernel) -> Bound:
    """What the gradient of what a case declares is made of, the forward's results included."""
    (q, k, v, dout), declared = case.inputs_on("cpu")
    out, lse = kernel(q, k, v, return_lse=True, **declared)
    named = {"dout": dout, "out": out, "lse": lse, **declared}
    given = check_arguments(kernel.manifest, q, k, v, None, {}, "bshd", named, GRADIENTS_INTAKE)
    return bind(kernel.manifest, given, kernel.gradients_of(declared)[3:], 2)


def run_gradient(call: Call, bound: Bound) -> torch.Tensor:
    """The gradient of what a case declares."""
    return run_call(call, bound)[bound.wanted[0]]


def spare_steps(case: DeclaredCase) -> Iterator[str]:
    """The Steps of the kernel of a gradient without which the simulator does not fault, and the same comes out."""
    kernel = case.kernel("sm_90a")
    given = [given_gradient(replace(case, lengths=lengths), kernel) for lengths in LENGTHS]
    whole = [run_gradient(kernel.call, each) for each in given]
    (plan,) = (each for each in kernel.call.gradients if "sums_of" in each.schedule)
    for missing, program in without_one(plan.worker.program):
        shorter: KernelPlan = replace(plan, roles=(replace(plan.worker, program=program),))
        kernels = tuple(shorter if each is plan else each for each in kernel.call.kernels)
        made = (run_gradient(replace(kernel.call, kernels=kernels), each) for each in given)
        try:
            is_spare = all(torch.equal(x, y) for x, y in zip(made, whole, strict=True))
        except SimulationFault:
            continue
        if is_spare:
            yield missing


@pytest.mark.parametrize("owner", READS)
@pytest.mark.parametrize("mask", [WINDOW, WALKED], ids=["window", "walked"])
def test_every_step_is_needed(owner: str, mask: str) -> None:
    """Without any one of them the simulator faults, or another gradient comes out."""
    loops_over_keys_ahead = mask == WINDOW and owner in ("query", "any order")
    assert list(spare_steps(case_of(owner, mask))) == ([LAST_OF_TWO] if loops_over_keys_ahead else [])


@pytest.mark.parametrize("owner", READS)
def test_every_step_of_wide_heads_is_needed(owner: str) -> None:
    """Of which there is one stage for a block."""
    assert list(spare_steps(case_of(owner, WINDOW, head_dim=192))) == []


@pytest.mark.parametrize("owner", READS)
def test_programs_are_counted_without_values(owner: str) -> None:
    """FLOPs are those of two products a pair of blocks that is visited; what is stored is counted."""
    case = case_of(owner, "causal")
    (plan,) = (each for each in case.kernel("sm_90a").call.gradients if "sums_of" in each.schedule)
    traffic = count(plan, 128, 128, batch=2, heads=2, heads_kv=1)
    visits = sum(
        n * plan.block_n <= m * plan.block_m + plan.block_m - 1
        for m in range(128 // plan.block_m)
        for n in range(128 // plan.block_n)
    )
    assert traffic.flops == 2 * 2 * visits * 2 * 2 * plan.block_m * plan.block_n * case.head_dim
    (stored,) = traffic.written.values() if owner != "any order" else (0,)
    expected = {"pair": 128 * 128 * 4, "query": 2048, "key": 2048, "table": 2 * 2 * 2 * 7 * 4, "any order": 0}
    assert stored == expected[owner]


def test_sums_of_keys_stand_as_far_apart_as_there_are_keys() -> None:
    """The text steps from head to head by seqlen_k where rows are keys, which the simulator cannot tell."""
    kernel = case_of("key", "causal").kernel("sm_90a")
    (plan,) = (each for each in kernel.call.gradients if "sums_of" in each.schedule)
    (store,) = (
        line
        for line in kernel.modules[plan.module].source.splitlines()
        if "store_rows<" in line and "(" in line and "DEV" not in line
    )
    assert "params.sums_of_u + (" in store and ") * params.seqlen_k, sums," in store


HARD = {
    "mask": "causal and document(doc)",
    "score": "softcap(score + bias[h, q_idx, kv_idx], cap) + u[h, kv_idx] * alibi(slopes)"
    " + table[clamp(kv_idx - q_idx, -8, 7) + 8, h]",
    "tensors": {
        "doc": "i32[batch, seqlen_k]",
        "bias": "bf16[num_heads_q, seqlen_q, seqlen_k]",
        "u": "f32[num_heads_q, seqlen_k]",
        "slopes": "f32[num_heads_q]",
        "table": "f32[16, num_heads_q]",
    },
    "scalars": {"cap": "f32"},
    "gradients": ["q", "k", "v", "bias", "u", "slopes", "table", "cap"],
}
PLAIN = {
    "mask": "causal",
    "score": "score + bias[b, h, q_idx, kv_idx] + alibi(slopes) + u[kv_idx] + loose[kv_idx - q_idx]",
    "tensors": {
        "bias": "f32[batch, num_heads_q, seqlen_q, seqlen_k]",
        "slopes": "f32[num_heads_q]",
        "u": "f16[seqlen_k]",
        "loose": "f32[n]",
    },
    "gradients": ["q", "k", "v", "bias", "slopes", "u", "loose"],
    "deterministic": False,
}


@pytest.mark.matrix(most=2)
@pytest.mark.usefixtures("nvdisasm")
@pytest.mark.parametrize("spec", [PLAIN, HARD], ids=["plain", "capped under documents"])
@pytest.mark.parametrize(
    ("target", "head_dim"), [("sm_90a", 64), ("sm_90a", 128), ("sm_90a", 256), ("sm_80", 128)]
)
def test_kernels_compile_without_spills(target: str, head_dim: int, spec: dict) -> None:
    """Nothing spills, and nothing of device memory is touched before a kernel has waited for those before it."""
    kernel = attngen.compile({"target": target, "problem": {"head_dim": head_dim}, **spec})
    found = [plan for plan in kernel.call.gradients if "sums_of" in plan.schedule]
    assert len(found) == len(spec["gradients"]) - 3
    for plan in found:
        compiled = kernel.modules[plan.module].compiled
        assert compiled.warnings == ()
        assert all(used.spill_stores == used.spill_loads == 0 for used in compiled.resources), plan.name
        if target == "sm_90a":
            assert done_before_waiting(disassemble(compiled.cubin)) == []


@pytest.mark.parametrize("seqlen_q", [1, 64, 113, 257])
def test_tables_of_blocks_lie_where_they_are_summed(seqlen_q: int) -> None:
    """The text's place of a block's table is that of an array (batch, heads, blocks), whatever the last one holds."""
    kernel = case_of("table", "full", 64).kernel("sm_90a")
    (plan,) = (each for each in kernel.call.gradients if "sums_of" in each.schedule)
    found = re.search(r"const i64 block = (.*);", kernel.modules[plan.module].source)
    assert found is not None
    place = found[1].replace("(i64)", "").replace("/", "//")
    blocks = -(-seqlen_q // plan.block_m)
    names = {"kBlockM": plan.block_m, "params": SimpleNamespace(num_heads_q=3)}
    tiles = [(b, h, m) for b in range(2) for h in range(3) for m in range(blocks)]
    tile = [SimpleNamespace(batch=b, head=h, m_block=m, seqlen_q=seqlen_q) for b, h, m in tiles]
    assert [eval(place, names | {"tile": each}) for each in tile] == list(range(len(tiles)))
