"""What is emitted for walks, modified scores and tables of extremes, and what NVRTC makes of it. Needs no GPU."""

import re
from typing import Any

import pytest
import torch

import attngen
from attngen.arch import ARCHS
from attngen.emit import Manifest, emit, manifest
from attngen.expr import evaluate
from attngen.lower import lower
from attngen.plan import walk
from attngen.plan.steps import TAKEN, ModifyScores
from tests.emit.test_compiled import assert_compiles_as_planned
from tests.reference.language_cases import CASES, LanguageCase

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


@pytest.mark.parametrize("case", COMPILED, ids=str)
@pytest.mark.parametrize(("arch", "kind", "dim"), ON)
def test_masks_and_scores_compile_without_spills(arch: str, kind: str, dim: int, case: LanguageCase) -> None:
    """No spill, no stack, no serialised wgmma, and registers for as many blocks as planned; the tables' kernel too."""
    assert_compiles_as_planned(kernel(case, kind, arch, dim))


FAMILIES = ("serial", "fa2", "warp_specialized")


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_case_compiles(kind: str) -> None:
    """All masks, scores and types of tensors that the other tests run give C++ that NVRTC takes without a warning.

    Each with one family of schedules, in turn: their texts of masks and scores are the same.
    """
    cases = list({(case.mask, case.score): case for case in CASES}.values())
    for case in cases[FAMILIES.index(kind) :: len(FAMILIES)]:
        made = kernel(case, kind)
        compiled = made.compiled
        assert compiled.warnings == (), str(case)
        names = {made.plan.name} | ({made.plan.table_kernel.name} if made.plan.table_kernel else set())
        assert {used.name for used in compiled.resources} == names


@pytest.mark.parametrize(
    ("score", "argument"),
    [
        ("softcap(score, 30.0)", "score / 30.0"),
        ("softcap(score, cap)", "score / cap"),
        ("softcap(score + f32(kv_idx), 30.0)", "(score + f32(kv_idx)) / 30.0"),
        ("softcap(score, 30.0) + alibi(slopes)", "score / 30.0"),
        ("score * tanh(score)", "score"),
        ("score * tanh(2.0 * score)", None),
        ("score + alibi(slopes)", None),
        ("score + tanh(f32(q_idx))", None),
        ("tanh(slopes[h]) * 2.0", None),
        ("tanh(tanh(score))", None),
        ("tanh(score) + tanh(2.0 * score)", None),
    ],
)
def test_a_warp_looks_before_it_takes_a_tanh(score: str, argument: str | None) -> None:
    """Where the scaled product enters in one tanh alone: with its argument in hand the warp takes one of two ways."""
    made = kernel(LanguageCase(score=score))
    (step, *_) = (each for each in walk(made.plan.kernel.worker.program) if isinstance(each, ModifyScores))
    for function in ("tanh_argument(params", "modified_score<true>(params", "modified_score<false>(params"):
        assert (function in made.source) == bool(argument)
    if step.by_tanh is None:
        assert argument is None
        return
    taken, rest = step.by_tanh
    assert str(taken) == argument
    names = {"score": torch.linspace(-3, 3, 50), "q_idx": torch.tensor(7), "kv_idx": torch.arange(50)}
    names |= {
        "h": torch.tensor(1),
        "seqlen_q": torch.tensor(9),
        "seqlen_k": torch.tensor(50),
        "cap": torch.tensor(2.5),
    }
    tensors = {"slopes": torch.tensor([0.5, 0.25])}
    whole = evaluate(step.score, names, tensors)
    parts = evaluate(rest, names | {"score": torch.nan, TAKEN: evaluate(taken, names, tensors)}, tensors)
    assert torch.equal(whole, parts) and whole.unique().numel() > 10


def test_no_declared_name_is_taken_for_what_tanh_takes() -> None:
    """A spec may call a scalar what the emitted function calls its parameter."""
    spec = {"problem": {"head_dim": 64}, "scalars": {"argument": "f32"}, "score": "argument * tanh(score)"}
    source = attngen.compile(spec, arch="sm_90a").source
    assert "return params.arg_argument * tanh_approx<kNear>(argument);" in source


@pytest.mark.parametrize(
    ("score", "spec", "by_tanh"),
    [
        ("softcap(score, 30.0)", {"problem": {"head_dim": 224}}, True),
        ("softcap(score, 30.0)", {"problem": {"head_dim": 256}}, False),
        ("softcap(score, 30.0)", {"problem": {"head_dim": 64}, "schedule": {"warpgroups": 3}}, True),
        (
            "softcap(score, 30.0) + alibi(slopes)",
            {"problem": {"head_dim": 64}, "schedule": {"warpgroups": 3}},
            False,
        ),
        (
            "softcap(score, 30.0) + alibi(slopes)",
            {"problem": {"head_dim": 64}, "schedule": {"warpgroups": 2}},
            True,
        ),
        ("softcap(score, 30.0) + alibi(slopes)", {"problem": {"head_dim": 192}}, False),
        ("exp(tanh(score))", {"problem": {"head_dim": 64}, "schedule": {"warpgroups": 3}}, False),
        ("softcap(score + bias[h, q_idx, kv_idx], 9.0)", {"problem": {"head_dim": 64}}, False),
    ],
)
def test_two_ways_to_a_score_want_registers(score: str, spec: dict[str, Any], by_tanh: bool) -> None:
    """Where they are taken nothing spills; where more would spill they are not."""
    made = attngen.compile(LanguageCase("causal", score).spec(**spec), arch="sm_90a")
    assert ("tanh_argument(params" in made.source) == by_tanh
    if by_tanh:
        assert_compiles_as_planned(made)


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
        lower(
            attngen.load({"problem": {"head_dim": 64}, "schedule": {"kind": kind}, **text}), ARCHS["sm_90a"]
        )
        for text in texts
    ]
    assert len({nameless(plan) for plan in plans}) == 1
    assert len({plan.name for plan in plans}) == 1
    other = attngen.load({"problem": {"head_dim": 64}, "schedule": {"kind": kind}, "mask": "kv_idx < q_pos"})
    assert nameless(lower(other, ARCHS["sm_90a"])) != nameless(plans[0])


def test_a_score_that_is_the_product_adds_nothing() -> None:
    """`score`, and `score` through a definition that changes nothing, emit what a spec without a score emits."""
    spec = {"problem": {"head_dim": 64}, "mask": "causal"}
    plain, named, same = (
        nameless(lower(attngen.load(spec | more), ARCHS["sm_90a"]))
        for more in ({}, {"score": "score"}, {"score": "mine(score)", "define": {"mine(x)": "x"}})
    )
    assert plain == named == same and "modify_score" not in plain


@pytest.mark.parametrize("kind", ["serial", "fa2", "warp_specialized", "pingpong"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_manifest_of_the_language_survives_its_json(kind: str, case: LanguageCase) -> None:
    """Tensors, scalars, workspaces and the kernel of tables come back from the .json unchanged."""
    made = kernel(case, kind)
    found = Manifest.from_json(made.manifest.to_json())
    assert found == made.manifest == manifest(made.plan)
    declared = case.declarations
    assert {entry.name for entry in found.tensors} == set(declared["tensors"])
    assert {entry.name for entry in found.scalars} == set(declared["scalars"])
    for entry in found.tensors:
        assert f"{entry.dtype}[{', '.join(map(str, entry.dims))}]" == declared["tensors"][entry.name]


def test_parameters_are_those_that_are_read() -> None:
    """A tensor brings its address, its strides and the sizes it binds, and a score the scale that it takes itself."""
    case = LanguageCase("causal", "score + t[0, min(kv_idx, 3)]")
    values = {param.value for param in kernel(case).manifest.kernels[0].params}
    plain = {param.value for param in kernel(LanguageCase("causal")).manifest.kernels[0].params}
    of_tensor = {"tensor.t.ptr", "tensor.t.stride_0", "tensor.t.stride_1", "size.n"}
    of_score = {"softmax_scale", "score_factor_log2"}
    assert values - plain == of_tensor | of_score
    assert plain - values == {"scale_is_negative", "softmax_scale_log2"}


def test_tables_are_filled_before_they_are_read() -> None:
    """The kernel of tables is launched first, has the parameters of the other and a workspace for each extreme."""
    made = kernel(LanguageCase("document(doc)"), "warp_specialized").manifest
    assert [entry.kernel for entry in made.launches] == [f"{made.name}_tables", made.name]
    spaces = [space.name for space in made.workspaces]
    assert spaces and {name[-3:] for name in spaces} == {"_lo", "_hi"}
    tables, attention = (
        {param.name: param.value for param in entry.params}
        for entry in sorted(made.kernels, key=lambda entry: entry.name, reverse=True)
    )
    assert tables == attention
