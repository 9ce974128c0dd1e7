"""What a spec leaves open is searched: a refusal means that no choice of the rest helps."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refused import SPECIALISED, only

import attngen
from attngen.arch import ARCHS
from attngen.lower import Features, build, candidates, lower
from attngen.lower.choice import AnyChoice, WarpgroupChoice
from attngen.lower.table import PARTS, slice_of
from attngen.plan import KernelPlan
from attngen.plan.hardware_rules import RULES, verify
from attngen.spec import Spec
from tests.effort import examples
from tests.plans import kernel_plan

LANGUAGE: list[dict[str, Any]] = [
    {},
    {"mask": "causal"},
    {"mask": "window(128, 0)", "score": "softcap(score, 30.0)"},
    {"mask": "chunked(64)", "score": "score + alibi(slopes)", "tensors": {"slopes": "f32[num_heads_q]"}},
    {"score": "score + bias[h, q_idx, kv_idx]", "tensors": {"bias": "bf16[num_heads_q, seqlen_q, seqlen_k]"}},
]
EIGHT_BITS = [
    {"inputs": "e4m3", "scales": scales, "promote": promote}
    for scales in ("per_head", "per_block", "per_token")
    for promote in (0, 1)
]
TARGETS = [
    *product(("sm_80", "sm_86"), ("serial", "fa2")),
    *product(("sm_90a", "simulator"), ("serial", "fa2", *SPECIALISED)),
]
NUMBERS = {
    "block_m": (16, 48, 64, 100, 128, 192, 256, 512),
    "block_n": (16, 32, 40, 64, 96, 128, 192, 200, 256, 512),
    "stages": (1, 2, 3, 6, 8, 9),
    "warps": (1, 3, 4, 8, 12, 16, 40),
    "warpgroups": (1, 2, 3, 4),
}


@st.composite
def partial_specs(draw: st.DrawFn) -> tuple[Spec, str, str]:
    """A spec that says some of its numbers, legal or not, with its target and schedule."""
    arch, kind = draw(st.sampled_from(TARGETS))
    takes_8bit = kind in SPECIALISED
    precision = draw(st.sampled_from([{"inputs": "bf16"}, *(EIGHT_BITS if takes_8bit else [])]))
    owners = "warpgroups" if takes_8bit else "warps"
    said = {
        name: draw(st.sampled_from(NUMBERS[name]))
        for name in sorted(
            draw(st.sets(st.sampled_from(("block_m", "block_n", "stages", owners)), max_size=3))
        )
    }
    dims = {name: draw(st.sampled_from((32, 64, 80, 128, 192, 208, 256))) for name in ("qk", "v")}
    document = {
        "problem": {"head_dim": dims},
        "precision": precision,
        "tile": {name: value for name, value in said.items() if name.startswith("block")},
        "schedule": {"kind": kind, **{k: v for k, v in said.items() if not k.startswith("block")}},
    }
    return attngen.load(document | draw(st.sampled_from(LANGUAGE))), arch, kind


def rest(features: Features, schedule: str) -> Iterator[AnyChoice]:
    """A grid of what a spec leaves open, thought of apart from how lowering searches it."""
    base = candidates(features, schedule)[0]
    of_warpgroups, said = isinstance(base, WarpgroupChoice), features.given
    sizes = {
        "block_m": (64, 128, 192) if of_warpgroups else (16, 32, 48, 64, 96, 128, 256),
        "block_n": (16, 32, 48, 64, 96, 128, 160, 256),
        "stages": (1, 2, 3),
        "warpgroups" if of_warpgroups else "warps": (1, 2, 3) if of_warpgroups else (1, 2, 3, 4, 6, 8, 16),
    }
    if of_warpgroups:
        parts = (
            {slice_of(features.head_dim_v, most) for most in PARTS.values()} if features.promotes else (0,)
        )
        flags = {
            "out_over_q": (True, False),
            "q_stages": (1, 2),
            "persistent": (True, False),
            "part_cols": parts,
        }
        sizes |= flags
    open_sizes = {name: values for name, values in sizes.items() if name not in said}
    fixed = {name: said[name] for name in sizes if name in said}
    for values in product(*open_sizes.values()):
        numbers: dict[str, Any] = dict(zip(open_sizes, values, strict=True)) | fixed
        if (
            not numbers.get("out_over_q") or numbers["q_stages"] == 1
        ):  # a result lies over Q of one stage alone
            yield replace(base, **numbers)


def numbers_of(plan: KernelPlan) -> dict[str, int]:
    """The numbers of a plan that a spec may say."""
    owners = {"warpgroups": plan.worker.warpgroups, "warps": plan.warps}
    return {"block_m": plan.block_m, "block_n": plan.block_n, "stages": plan.stages, **owners}


@settings(max_examples=examples(3))
@given(partial_specs())
def test_a_refusal_means_that_no_choice_of_the_rest_helps(drawn: tuple[Spec, str, str]) -> None:
    """Where lowering finds no legal plan, a grid of the numbers left open has none; what it finds is what was said."""
    spec, arch, schedule = drawn
    features = Features.of(spec, ARCHS[arch])
    try:
        plan = kernel_plan(spec, ARCHS[arch])
    except attngen.PlanError as refused:
        assert {fault.rule for fault in refused.diagnostics} <= set(RULES)
        legal = (
            choice for choice in rest(features, schedule) if not verify(build(features, schedule, choice))
        )
        assert next(legal, None) is None
    else:
        assert not verify(plan)
        assert numbers_of(plan).items() >= features.given.items()


def test_warps_are_found_for_a_tile() -> None:
    """fa2, head_dim 128: four warps have no registers for 128x128, eight have."""
    changes = {"problem": {"head_dim": 128}, "tile": {"block_m": 128, "block_n": 128}}
    plan = kernel_plan(attngen.load(changes | {"schedule": {"kind": "fa2"}}), ARCHS["sm_90a"])
    assert (plan.block_m, plan.block_n, plan.warps) == (128, 128, 8)
    fault = only(**changes, schedule={"kind": "fa2", "warps": 4})
    assert (fault.rule, fault.path, fault.nearest) == ("registers", "tile.block_n", ("80",))


@pytest.mark.parametrize(
    ("arch", "changes", "found"),
    [
        ("sm_90a", {"schedule": {"stages": 8}}, {"block_m": 128, "block_n": 48}),
        ("sm_80", {"schedule": {"kind": "fa2", "warps": 3}}, {"block_m": 96, "block_n": 64}),
        ("sm_80", {"schedule": {"kind": "fa2"}, "tile": {"block_m": 32}}, {"warps": 2, "block_n": 64}),
        ("simulator", {"schedule": {"kind": "pingpong", "warpgroups": 3}}, {"block_m": 63, "block_n": 64}),
        ("simulator", {"schedule": {"kind": "pingpong"}, "tile": {"block_m": 5}}, {"warpgroups": 1}),
    ],
    ids=str,
)
def test_the_rest_stays_near_the_table(
    arch: str, changes: dict[str, dict[str, Any]], found: dict[str, int]
) -> None:
    """Of what is legal beside what a spec says, what differs least from the table's row is taken."""
    plan = kernel_plan(attngen.load({"problem": {"head_dim": 128}} | changes), ARCHS[arch])
    assert numbers_of(plan).items() >= found.items()


def test_warps_share_the_registers_of_a_block() -> None:
    """Sixteen warps leave a thread 128 registers: 512 rows of head_dim 128 have none, and the search knows."""
    tile = {"block_m": 512, "block_n": 16}
    spec = attngen.load({"problem": {"head_dim": 128}, "tile": tile, "schedule": {"kind": "fa2"}})
    with pytest.raises(attngen.PlanError) as caught:
        lower(spec, ARCHS["sm_80"])
    assert {fault.rule for fault in caught.value.diagnostics} == {"registers"}


@pytest.mark.parametrize(("rows", "nearest"), [(48, "32"), (64, "32"), (40, "32")])
def test_the_nearest_rows_where_warps_share_out_keys_count_all_numbers_of_warps(
    rows: int, nearest: str
) -> None:
    """Each warp has keys of its own: with one warp 32 rows have no registers, with eight they have."""
    fault = only(split="auto", mask="causal", tile={"block_m": rows})
    assert fault.path == "tile.block_m" and fault.nearest == (nearest,)
