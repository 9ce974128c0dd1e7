"""What is emitted for walks, modified scores and tables of extremes, and what NVRTC makes of it. Needs no GPU."""

import re
from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest
import torch

import attngen
from attngen.arch import ARCHS
from attngen.emit import emit
from attngen.expr import TRUE, evaluate, name
from attngen.plan import Manifest, assemble, walk
from attngen.plan.steps import TANH, IssueGemm, ModifyScores, RowMax, ScaleRows, SeedScores
from tests.check.language_cases import CASES, LanguageCase
from tests.emit.test_compiled import assert_compiles_as_planned
from tests.plans import kernel_plan

SINKS = "window(128, 0) or sinks(4)"
COMPILED = (
    LanguageCase(SINKS),
    LanguageCase("document(doc)"),
    LanguageCase("causal", "softcap(score, 30.0)"),
    LanguageCase("causal", "score + alibi(slopes)"),
    LanguageCase("window(128, 0)"),
    LanguageCase("window(128, 0)", "softcap(score, 30.0)"),
)
ON = (
    *(("sm_90a", "warp_specialized", dim) for dim in (64, 128, 256)),
    ("sm_90a", "pingpong", 128),  # of the same functions
    *((arch, "fa2", dim) for arch in ("sm_90a", "sm_80") for dim in (64, 128)),
)


def kernel(case: LanguageCase, kind: str = "fa2", arch: str = "sm_90a", dim: int = 64) -> attngen.Kernel:
    return attngen.compile(case.spec(problem={"head_dim": dim}, schedule={"kind": kind}), arch=arch)


@pytest.mark.matrix(most=3)
@pytest.mark.usefixtures("nvdisasm")
@pytest.mark.parametrize("case", COMPILED, ids=str)
@pytest.mark.parametrize(("arch", "kind", "dim"), ON)
def test_masks_and_scores_compile_without_spills(arch: str, kind: str, dim: int, case: LanguageCase) -> None:
    """No spill, no stack, no serialised wgmma, and registers for as many blocks as planned; the tables' kernel too."""
    assert_compiles_as_planned(kernel(case, kind, arch, dim))


FAMILIES = ("serial", "fa2", "warp_specialized")
IN_TURN = list(zip({(case.mask, case.score): case for case in CASES}.values(), cycle(FAMILIES), strict=False))
"""Every text with one family of schedules: their texts of masks and scores are the same."""


@pytest.mark.matrix(
    classes=lambda case, kind: [
        ("mask", case.mask),
        ("score", case.score),
        ("score with", kind, case.score != "score"),
    ],
    most=14,
)
@pytest.mark.parametrize(("case", "kind"), IN_TURN, ids=str)
def test_every_case_compiles(case: LanguageCase, kind: str) -> None:
    """All masks, scores and types of tensors that the other tests run give C++ that NVRTC takes without a warning."""
    made = kernel(case, kind)
    compiled = made.compiled
    assert compiled.warnings == ()
    names = {made.plan.name} | ({f"{made.plan.name}_tables"} if made.plan.tables else set())
    assert {used.name for used in compiled.resources} == names


@pytest.mark.parametrize(
    ("score", "multiple", "is_tanh"),
    [
        ("softcap(score, 30.0)", "0.033333335", True),
        ("softcap(score, 500.0)", "0.002", True),
        ("softcap(score, cap)", "1.0 / cap", False),
        ("softcap(score + f32(kv_idx), 30.0)", "0.033333335", True),
        ("softcap(2.0 * score + f32(kv_idx), 30.0)", None, False),
        ("softcap(score, 30.0) + alibi(slopes)", "0.033333335", False),
        ("score * tanh(score)", None, False),
        ("tanh(score * slopes[h])", None, False),
        ("tanh(1.0 / score)", None, False),
        ("score + tanh(f32(q_idx))", None, False),
        ("tanh(slopes[h]) * 2.0", None, False),
        ("tanh(tanh(score))", None, False),
        ("tanh(score) + tanh(2.0 * score)", None, False),
    ],
)
def test_a_warp_looks_before_it_takes_a_tanh(score: str, multiple: str | None, is_tanh: bool) -> None:
    """Where the score enters by the tanh of a multiple alone: with all in hand a warp takes one of two ways."""
    made = kernel(LanguageCase(score=score), "warp_specialized")
    steps = [each for each in walk(made.plan.worker.program) if isinstance(each, ModifyScores)]
    assert ("tanh_of.near(s)" in made.source) == ("tanh_of.far(s)" in made.source) == bool(multiple)
    if multiple is None:
        assert all(step.by_tanh is None for step in steps)
        return
    step = steps[0]
    assert step.by_tanh is not None
    found, rest = step.by_tanh
    assert (str(found), step.is_tanh) == (multiple, is_tanh)
    assert ("modified_score(params" in made.source) != is_tanh
    names = {"score": torch.linspace(-3, 3, 50), "q_idx": torch.tensor(7), "kv_idx": torch.arange(50)}
    names |= {
        "h": torch.tensor(1),
        "seqlen_q": torch.tensor(9),
        "seqlen_k": torch.tensor(50),
        "cap": torch.tensor(2.5),
    }
    tensors = {"slopes": torch.tensor([0.5, 0.25])}
    tanh = torch.tanh(names["score"] * evaluate(found, names, tensors))
    parts = evaluate(rest, names | {"score": torch.nan, TANH.name: tanh}, tensors)
    whole = torch.as_tensor(evaluate(step.score, names, tensors))
    assert torch.allclose(whole, torch.as_tensor(parts), rtol=1e-6) and whole.unique().numel() > 10


@pytest.mark.parametrize(
    ("score", "multiple"),
    [
        ("tanh(score * (x + 1.0))", "params.softmax_scale * (params.arg_x + 1.0f)"),
        ("exp(tanh(score * (f32(h) - 3.0)))", "params.softmax_scale * ((float)tile.head - 3.0f)"),
        (
            "tanh(score * (x if f else 1.0))",
            "params.softmax_scale * (((params.arg_f != 0)) ? params.arg_x : 1.0f)",
        ),
        ("tanh(score / (x + 1.0))", "params.softmax_scale * __fdividef(1.0f, params.arg_x + 1.0f)"),
    ],
)
def test_a_multiple_is_scaled_as_a_whole(score: str, multiple: str) -> None:
    """A sum or a choice is bracketed in the product with softmax_scale."""
    scalars = {name: type for name, type in (("x", "f32"), ("f", "bool")) if re.search(rf"\b{name}\b", score)}
    spec = {"problem": {"head_dim": 128}, "score": score, "scalars": scalars}
    assert f"return tanh_of_multiple({multiple}, " in attngen.compile(spec, arch="sm_90a").source


def test_no_declared_name_is_taken_for_the_tanh() -> None:
    """A spec may call a scalar what the emitted function calls its parameter."""
    spec = {"problem": {"head_dim": 64}, "scalars": {"tanh_of": "f32"}, "score": "tanh_of * tanh(score)"}
    source = attngen.compile(spec, arch="sm_90a").source
    assert "return params.arg_tanh_of * tanh;" in source


@pytest.mark.usefixtures("nvdisasm")
@pytest.mark.parametrize(
    ("score", "spec", "by_tanh"),
    [
        ("softcap(score, 30.0)", {"problem": {"head_dim": 224}}, True),
        ("softcap(score, 30.0)", {"problem": {"head_dim": 256}}, False),
        ("softcap(score, 30.0)", {"problem": {"head_dim": 64}, "schedule": {"warpgroups": 3}}, True),
        ("softcap(score, 30.0) + alibi(slopes)", {"problem": {"head_dim": 64}}, True),
        ("softcap(score, 30.0) + alibi(slopes)", {"problem": {"head_dim": 192}}, False),
        ("exp(tanh(score))", {"problem": {"head_dim": 64}}, True),
        ("exp(tanh(score))", {"problem": {"head_dim": 64}, "schedule": {"warpgroups": 3}}, False),
        ("softcap(score + bias[h, q_idx, kv_idx], 9.0)", {"problem": {"head_dim": 64}}, False),
    ],
)
def test_two_ways_to_a_score_want_registers(score: str, spec: dict[str, Any], by_tanh: bool) -> None:
    """Where they are taken nothing spills; where more would spill they are not."""
    made = attngen.compile(LanguageCase("causal", score).spec(**spec), arch="sm_90a")
    assert ("tanh_of.near(s)" in made.source) == by_tanh
    if by_tanh:
        assert_compiles_as_planned(made)


@pytest.mark.parametrize(
    ("score", "seed", "rest"),
    [
        ("score + alibi(slopes)", "slopes[h] * f32(kv_idx + seqlen_q - q_idx - seqlen_k)", "score"),
        ("f32(q_idx) + score - slopes[h]", "f32(q_idx)", "score - slopes[h]"),
        ("2.0 * (score + f32(kv_idx))", "f32(kv_idx)", "score"),
        ("tanh(score - f32(kv_idx)) + slopes[h]", "-f32(kv_idx)", "tanh(score) + slopes[h]"),
        ("abs(score + f32(h)) * (score + f32(h))", "f32(h)", "abs(score) * score"),
        ("score + bias[h, q_idx, kv_idx] + slopes[h]", None, "score + bias[h, q_idx, kv_idx] + slopes[h]"),
        ("f32(kv_idx) - score", None, "f32(kv_idx) - score"),
        ("score + tanh(score)", None, "score + tanh(score)"),
        ("score + score", None, "score + score"),
        ("score * f32(kv_idx)", None, "score * f32(kv_idx)"),
    ],
)
@pytest.mark.parametrize("kind", ["warp_specialized", "fa2"])
def test_what_is_added_to_the_product_starts_its_gemm(
    kind: str, score: str, seed: str | None, rest: str
) -> None:
    """Of wgmma on 16-bit inputs, whose accumulators are there before; what is left of the score is modified after."""
    made = kernel(LanguageCase(score=score), kind)
    steps = {type(step): step for step in walk(made.plan.worker.program)}
    found = steps.get(SeedScores)
    if kind == "fa2" or seed is None:
        assert found is None and isinstance(steps[ModifyScores], ModifyScores)
        return
    assert isinstance(found, SeedScores) and str(found.added) == seed
    assert isinstance(issue := steps[IssueGemm], IssueGemm) and not issue.starts_at_zero
    modify = steps.get(ModifyScores)
    assert (str(modify.score) if isinstance(modify, ModifyScores) else "score") == rest
    assert ("params.softmax_scale_inverse" in made.source) and ("params.scale_is_negative" in made.source)


@pytest.mark.parametrize(("inputs", "dim"), [("e4m3", 64), ("f16", 64), ("bf16", 192)])
def test_not_all_products_are_added_to(inputs: str, dim: int) -> None:
    """The tensor core drops bits of large terms: more than e4m3, f16's P and long rows bear."""
    case = LanguageCase(score="score + alibi(slopes)")
    spec = case.spec(problem={"head_dim": dim}, precision={"inputs": inputs})
    steps = {type(step) for step in walk(attngen.compile(spec, arch="sm_90a").plan.worker.program)}
    assert ModifyScores in steps and SeedScores not in steps


@pytest.mark.parametrize("kind", ["fa2", "warp_specialized", "pingpong"])
@pytest.mark.parametrize(
    ("score", "precision", "needs_maximum"),
    [
        ("softcap(score, 30.0)", {"inputs": "bf16"}, False),
        ("softcap(score, 50.0)", {"inputs": "bf16"}, False),
        ("softcap(score, 60.0)", {"inputs": "bf16"}, True),
        ("softcap(score, 30.0)", {"inputs": "f16"}, True),
        ("softcap(score, 5.0)", {"inputs": "f16"}, False),
        ("clamp(score, -4.0, 6.0) + sigmoid(score)", {"inputs": "f16"}, True),
        ("clamp(score, -4.0, 6.0) - sigmoid(score)", {"inputs": "f16"}, False),
        ("softcap(score, 30.0) + alibi(slopes)", {"inputs": "bf16"}, True),
        ("abs(score)", {"inputs": "bf16"}, True),
    ],
)
def test_bounded_scores_need_no_maximum(
    kind: str, score: str, precision: dict[str, str], needs_maximum: bool
) -> None:
    """Their exponentials are taken as they are, O is never rescaled, and nothing of a maximum is kept."""
    case = LanguageCase("causal", score)
    spec = case.spec(problem={"head_dim": 64}, precision=precision, schedule={"kind": kind})
    made = attngen.compile(spec, arch="sm_90a")
    program = tuple(walk(made.plan.worker.program))
    rescales = [step for step in program if isinstance(step, ScaleRows) and step.by.name == "alpha"]
    assert bool(rescales) == any(isinstance(step, RowMax) for step in program) == needs_maximum
    assert ("float row_max[" in made.source) == ("float alpha[" in made.source) == needs_maximum
    assert ("exponentiate_bounded(acc_s" in made.source) != needs_maximum


def nameless(plan: Any) -> str:
    """The emitted text without what says whence the plan came."""
    text = emit(plan)
    for known in (plan.name, plan.spec_digest):
        text = text.replace(known, "")
    return re.sub(r"^// .*\n", "", text, flags=re.MULTILINE)


@pytest.mark.parametrize("kind", ["serial", "fa2", "warp_specialized", "pingpong"])
def test_a_mask_written_out_emits_what_its_definition_does(kind: str) -> None:
    """A definition of the prelude, its text, a definition of the spec and a Python function: one kernel."""
    texts: list[dict[str, Any]] = [
        {"mask": "causal"},
        {"mask": "kv_idx <= q_idx + seqlen_k - seqlen_q"},
        {"mask": "mine(0)", "define": {"mine(n)": "kv_idx <= q_pos + n"}},
        {"mask": attngen.expression(lambda q_pos, kv_idx: q_pos >= kv_idx)},
    ]
    plans = [
        kernel_plan(
            attngen.load({"problem": {"head_dim": 64}, "schedule": {"kind": kind}, **text}), ARCHS["sm_90a"]
        )
        for text in texts
    ]
    assert len({nameless(plan) for plan in plans}) == 1
    assert len({plan.name for plan in plans}) == 1
    other = attngen.load({"problem": {"head_dim": 64}, "schedule": {"kind": kind}, "mask": "kv_idx < q_pos"})
    assert nameless(kernel_plan(other, ARCHS["sm_90a"])) != nameless(plans[0])


def test_a_score_that_is_the_product_adds_nothing() -> None:
    """`score`, and `score` through a definition that changes nothing, emit what a spec without a score emits."""
    spec = {"problem": {"head_dim": 64}, "mask": "causal"}
    plain, named, same = (
        nameless(kernel_plan(attngen.load(spec | more), ARCHS["sm_90a"]))
        for more in ({}, {"score": "score"}, {"score": "mine(score)", "define": {"mine(x)": "x"}})
    )
    assert plain == named == same and "modify_score" not in plain


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["serial", "fa2", "warp_specialized", "pingpong"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_manifest_of_the_language_survives_its_json(kind: str, case: LanguageCase) -> None:
    """Tensors, scalars, workspaces and the kernel of tables come back from the .json unchanged."""
    made = kernel(case, kind)
    found = Manifest.from_json(made.manifest.to_json())
    assert found == made.manifest == assemble((made.plan,)).manifest
    declared = case.declarations
    assert {value.argument for value in found.declared} == set(declared["tensors"])
    assert {entry.name for entry in found.scalars} == set(declared["scalars"])
    for value in found.declared:
        assert f"{value.dtype}[{', '.join(map(str, value.shape))}]" == declared["tensors"][value.argument]


def test_parameters_are_those_that_are_read() -> None:
    """A tensor brings its address, its strides and the sizes it binds, and a score the scale that it takes itself."""
    case = LanguageCase("causal", "score + t[0, min(kv_idx, 3)]")
    values = {param.value for param in kernel(case).plan.params}
    plain = {param.value for param in kernel(LanguageCase("causal")).plan.params}
    of_tensor = {"tensor.t.ptr", "tensor.t.stride_0", "tensor.t.stride_1", "size.n"}
    of_score = {"softmax_scale", "score_factor_log2"}
    assert values - plain == of_tensor | of_score
    assert plain - values == {"scale_is_negative", "softmax_scale_log2"}


def test_tables_are_filled_before_they_are_read() -> None:
    """The kernel of tables is launched first, has the parameters of the other and a workspace for each extreme."""
    made = kernel(LanguageCase("document(doc)"), "warp_specialized").manifest
    assert [entry.kernel for entry in made.launches] == [f"{made.name}_tables", made.name]
    spaces = made.kept
    assert spaces and {name[-3:] for name in spaces} == {".lo", ".hi"}
    tables, attention = (
        {param.name: param.value for param in entry.params}
        for entry in sorted(made.kernels, key=lambda entry: entry.name, reverse=True)
    )
    assert tables == attention
    first, second = made.launches
    assert first.writes == spaces and set(spaces) <= set(second.reads)


@pytest.mark.parametrize("kind", ["fa2", "warp_specialized"])
@pytest.mark.parametrize("mask", ["causal", "kinds[b, kv_idx] != kinds[b, q_idx] and kv_idx % 3 != h"])
def test_mask_and_score_are_read_off_the_steps_alone(kind: str, mask: str) -> None:
    """What a kernel computes stands in its Steps and the blocks it visits; the plan's own copies are for people."""
    tensors = {"kinds": "i32[batch, seqlen_k]", "slopes": "f32[num_heads_q]"}
    score = "score + slopes[h] * f32(kv_idx - q_idx)"
    data = {
        "problem": {"head_dim": 64},
        "schedule": {"kind": kind},
        "tensors": {name: text for name, text in tensors.items() if name in mask + score},
        "mask": mask,
        "score": score,
    }
    plan = kernel_plan(attngen.load(data), ARCHS["sm_90a"])
    others = replace(plan, mask=TRUE, score=name("score"))
    body = "// ---- this kernel"
    assert emit(others).partition(body)[2] == emit(plan).partition(body)[2]
