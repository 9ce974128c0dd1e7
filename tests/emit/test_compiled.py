"""What NVRTC makes of the emitted text. Needs no GPU."""

import re

import pytest

import attngen
from attngen.arch import ARCHS
from attngen.compiled_module import Module
from attngen.plan import KernelPlan, walk
from attngen.plan.steps import PassTurn, RowMax
from attngen.resources import shipped_names
from attngen.runtime import DiskCache, disassemble
from tests.emit.sass import committed_cells, done_before_waiting, hot_loop, loops, row

pytestmark = pytest.mark.usefixtures("nvdisasm")
SHIPPED = [name for name in shipped_names() if attngen.load(name).target != "simulator"]


MATRIX_INSTRUCTIONS = {
    "serial": ("HMMA.16816.F32", "LDSM", "LDGSTS"),
    "fa2": ("HMMA.16816.F32", "LDSM", "LDGSTS"),
    "warp_specialized": ("HGMMA", "UTMALDG", "UTMASTG", "SYNCS", "USETMAXREG"),
    "pingpong": ("HGMMA", "UTMALDG", "UTMASTG", "SYNCS", "USETMAXREG"),
}
"""What feeds the tensor core, and the tensor core's own instruction, as SASS calls them."""


def assert_compiles_as_planned(kernel: attngen.Kernel) -> None:
    """No spill, no stack, no local memory in the SASS, the planned matrix instruction and no other, no C75xx.

    So for calls of any length and those for fewer keys; the registers leave room for as many blocks as planned.
    """
    for plan in kernel.call.programs:
        assert_program_compiles(plan, kernel.modules[plan.module])


def assert_program_compiles(plan: KernelPlan, module: Module) -> None:
    """What `assert_compiles_as_planned` says, of one attention kernel."""
    compiled = module.compiled
    for used in compiled.resources:
        assert (used.spill_stores, used.spill_loads, used.stack_bytes) == (0, 0, 0), used.name
    (used,) = (used for used in compiled.resources if used.name == plan.name)
    assert compiled.warnings == ()
    sass = module.sass()
    assert not re.search(r"\b(LDL|STL)\b", sass)
    if plan.arch.starts_early:
        assert not done_before_waiting(sass)
    planned = {
        "QGMMA" if name == "HGMMA" and plan.inputs.bits == 8 else name
        for name in MATRIX_INSTRUCTIONS[plan.schedule]
    }
    assert used.registers * plan.threads * plan.blocks_per_sm <= plan.arch.registers_per_sm
    if plan.worker.registers is None:
        planned.discard("USETMAXREG")
    for instruction in (
        "QGMMA",
        *dict.fromkeys(name for names in MATRIX_INSTRUCTIONS.values() for name in names),
    ):
        assert bool(re.search(rf"\b{re.escape(instruction)}", sass)) == (instruction in planned), instruction


def shown_by(name: str) -> set[tuple[str, str]]:
    """What a shipped spec has that others may have too."""
    spec = attngen.load(name)
    return {
        (spec.target, spec.schedule.kind),
        ("inputs", spec.precision.inputs),
        ("mask", spec.mask.split("(")[0]),
    }


@pytest.mark.matrix(classes=shown_by, most=6)
@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_spec_compiles_to_what_its_plan_and_the_table_of_sass_say(name: str) -> None:
    """Whole in registers, and with the numbers that docs/sass.md shows, for longer and for fewer keys.

    The table shows what a change of template does; `python tests/emit/regenerate.py` rewrites it.
    """
    kernel = attngen.compile(name)
    found = []
    for plan in reversed(kernel.call.programs):
        module = kernel.modules[plan.module]
        assert_program_compiles(plan, module)
        found.append(row(name, plan, module).cells)
    assert found == [cells for cells in committed_cells() if cells[0] == name]


def test_the_table_of_sass_has_the_shipped_specs() -> None:
    """Those that are emitted, in their order, and no others."""
    assert list(dict.fromkeys(name for name, *_ in committed_cells())) == SHIPPED


@pytest.mark.parametrize(
    ("first", "said"),
    [("", ": LDG"), ("  params.arg_doc[0] = 0;\n  wait_for_earlier_kernels();\n", ": STG")],
)
def test_whoever_does_not_wait_is_found(first: str, said: str) -> None:
    """The check above sees a kernel that never waits for those before it, and one that touches memory first."""
    source = attngen.compile("h100_document").source.replace("  wait_for_earlier_kernels();\n", first)
    sass = disassemble(DiskCache().get(source, "sm_90a").cubin)
    kernels = {done.split(":")[0] for done in done_before_waiting(sass) if said in done}
    assert len(kernels) == 2  # that of the tables too


@pytest.mark.matrix(most=3)
@pytest.mark.parametrize("head_dim", [32, 40, 64, 80, 96, 128, 192, 256, {"qk": 192, "v": 128}], ids=str)
@pytest.mark.parametrize(
    ("kind", "mask"),
    [("auto", "causal"), ("auto", "full"), ("warp_specialized", "causal"), ("pingpong", "causal")],
)
def test_warpgroups_compile_without_spills(kind: str, mask: str, head_dim: object) -> None:
    """Every head dim, with the tile that auto picks; each role stays within what setmaxnreg leaves it.

    The schedules with the mask that has both the masked loop and the other.
    """
    spec = {"problem": {"head_dim": head_dim}, "mask": mask, "schedule": {"kind": kind}}
    assert_compiles_as_planned(attngen.compile(spec, arch="sm_90a"))


@pytest.mark.matrix(most=2)
@pytest.mark.parametrize(
    ("head_dim", "scales", "mask", "promote"),
    [
        (48, "per_tensor", "full", "auto"),
        (64, "per_head", "document(doc)", "auto"),
        (80, "per_head", "causal", "auto"),
        (128, "per_token", "causal", "auto"),
        (128, "per_block", "full", 0),
        (208, "per_token", "full", "auto"),
        (128, "per_block", "document(doc)", "auto"),
        ({"qk": 192, "v": 128}, "per_block", "causal", "auto"),
    ],
    ids=str,
)
def test_e4m3_compiles_without_spills(head_dim: object, scales: str, mask: str, promote: object) -> None:
    """The tiles that auto picks; wgmma of e4m3 and no other."""
    spec = {
        "problem": {"head_dim": head_dim},
        "precision": {"inputs": "e4m3", "scales": scales, "promote": promote},
        "tensors": {"doc": "i32[batch, seqlen_k]"} if "doc" in mask else {},
        "mask": mask,
    }
    assert_compiles_as_planned(attngen.compile(spec, arch="sm_90a"))


@pytest.mark.parametrize(("name", "threes"), [("h100_bf16", 32), ("h100_fp8_per_head", 56), ("h100_d256", 0)])
def test_integer_maxima_take_three_at_a_time(name: str, threes: int) -> None:
    """A score costs half an instruction where the plan says so; where positive scores are missing, one."""
    made = attngen.compile(name)
    steps = [step for step in walk(made.plan.worker.program) if isinstance(step, RowMax)]
    assert {step.by_integers for step in steps} == {threes > 0}
    body = hot_loop(disassemble(made.compiled.cubin))
    assert body["VIMNMX3"] == threes
    assert body["FMNMX"] >= made.plan.block_n // 2


def test_scores_of_192_keys_stay_in_registers() -> None:
    """Three groups of 64 columns have scales of their own; loops over them are unrolled."""
    precision = {"inputs": "e4m3", "scales": "per_block", "promote": 0}
    spec = {"problem": {"head_dim": 128}, "precision": precision, "tile": {"block_n": 192}}
    assert_compiles_as_planned(attngen.compile(spec, arch="sm_90a"))


@pytest.mark.matrix(
    classes=lambda kind, overlap, persistent: [("overlap", kind, overlap), ("persistent", kind, persistent)]
)
@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("kind", ["warp_specialized", "pingpong"])
def test_every_form_of_the_warpgroup_schedules_compiles(kind: str, overlap: bool, persistent: bool) -> None:
    """Overlap and persistence on and off, with a mask that has no closed form, in f16."""
    schedule = {"kind": kind, "overlap": overlap, "persistent": persistent}
    spec = {
        "problem": {"head_dim": 128},
        "precision": {"inputs": "f16"},
        "mask": "kv_idx != q_idx",
        "schedule": schedule,
    }
    assert_compiles_as_planned(attngen.compile(spec, arch="sm_90a"))


def test_a_single_warpgroup_keeps_the_registers_of_its_launch() -> None:
    """With one consumer nothing is handed on: no setmaxnreg."""
    kernel = attngen.compile({"problem": {"head_dim": 128}, "schedule": {"warpgroups": 1}}, arch="sm_90a")
    sass = kernel.sass()
    assert "HGMMA" in sass and "USETMAXREG" not in sass


@pytest.mark.matrix
@pytest.mark.parametrize("head_dim", [32, 40, 80, 96, 192, 256])
@pytest.mark.parametrize("kind", ["fa2", "serial"])
def test_auto_tiles_do_not_spill(kind: str, head_dim: int) -> None:
    """What auto picks for each head dim compiles without spills, causal, on sm_90a."""
    spec = {"problem": {"head_dim": head_dim}, "mask": "causal", "schedule": {"kind": kind}}
    kernel = attngen.compile(spec, arch="sm_90a")
    (used,) = kernel.resources
    assert used.spill_stores == used.stack_bytes == 0


@pytest.mark.matrix(most=2)
@pytest.mark.parametrize("arch", [name for name, arch in ARCHS.items() if arch.emits])
def test_every_target_compiles(arch: str) -> None:
    """head_dim 128 finds a legal tile on every target, those with 99 KB of shared memory too."""
    for kind in ("auto", "fa2"):
        spec = {"problem": {"head_dim": 128}, "mask": "causal", "schedule": {"kind": kind}}
        kernel = attngen.compile(spec, arch=arch)
        assert kernel.resources[0].registers <= 255


BIASES = {
    "one": ("score + bias[h, q_idx, kv_idx]", {"bias": "bf16[num_heads_q, seqlen_q, seqlen_k]"}),
    "two, of a walk": (
        "softcap(score, 20.0) + bias[h, q_idx, kv_idx] + key[kv_idx]",
        {
            "bias": "f16[num_heads_q, seqlen_q, seqlen_k]",
            "key": "bf16[seqlen_k]",
            "doc": "i32[batch, seqlen_k]",
        },
    ),
}


@pytest.mark.matrix
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("which", BIASES)
def test_a_bias_is_loaded_in_pairs_and_under_no_gemm(which: str, head_dim: int) -> None:
    """Two keys a load where they lie in pairs, one where they do not; none under a score GEMM, and none spilt.

    A block's are loaded when the scores of the one before have landed; in a walk, which only then goes on, ahead of the
    score GEMM.
    """
    score, tensors = BIASES[which]
    mask = "document(doc)" if "doc" in tensors else "full"
    spec = {"problem": {"head_dim": head_dim}, "mask": mask, "score": score, "tensors": tensors}
    kernel = attngen.compile(spec, arch="sm_90a")
    assert_compiles_as_planned(kernel)
    sass = kernel.sass()
    lookups, rows = score.count("kv_idx"), 2
    blocks = (
        2 if mask != "full" else 3
    )  # the first, those after it; where they are known ahead also the second
    pairs = lookups * blocks * rows * kernel.plan.block_n // 8
    assert len(re.findall(r"\bLDG\.E\.U16\.CONSTANT\b", sass)) == 2 * pairs
    assert len(re.findall(r"\bLDG\.E\.LTC128B\.CONSTANT\b", sass)) == pairs
    under_gemms = re.findall(r"WARPGROUP\.ARRIVE(.*?)WARPGROUP\.DEPBAR", sass, re.DOTALL)
    assert len(under_gemms) == 3 and not any("LDG" in text for text in under_gemms)


@pytest.mark.matrix
@pytest.mark.parametrize("mask", ["full", "causal", "prefix(100)"])
@pytest.mark.parametrize("head_dim", [40, 64])
def test_late_turns_are_passed_before_the_softmax(head_dim: int, mask: str) -> None:
    """The others' GEMMs run under this warpgroup's exponentials: ptxas has not put the arrival behind them."""
    made = attngen.compile({"problem": {"head_dim": head_dim}, "mask": mask}, arch="sm_90a")
    assert any(isinstance(step, PassTurn) for step in walk(made.plan.worker.program))
    units = {"HGMMA", "MUFU"}
    bodies = (body for body in loops(made.sass()) if units <= {name.split(".")[0] for name in body})
    hot = min((body for body in bodies if "BAR.ARV" in body), key=len)
    assert hot.index("BAR.ARV") < next(i for i, name in enumerate(hot) if name.startswith("MUFU"))
