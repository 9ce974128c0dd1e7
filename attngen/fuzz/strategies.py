"""What is drawn: specs that are legal on a target, and problems that stress their tiles.

Every strategy shrinks towards the plainest case: serial, full mask, one row, contiguous, error bound only.
"""

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from attngen.arch import ARCHS, Arch
from attngen.check.inputs import EXACT_SCALE, KINDS, KINDS_WITH_SCALES, Shape
from attngen.errors import SpecError, SpecWarning
from attngen.expr import SINK
from attngen.fuzz import draw_cuts
from attngen.fuzz.case import MEMORIES, Case, Memory, call_layouts
from attngen.fuzz.draw_blocks import given_blocks
from attngen.fuzz.draw_pairs import pair_texts
from attngen.fuzz.properties import RULES
from attngen.fuzz.states import STATES
from attngen.lower import lower
from attngen.plan import CACHE_SCALES, LETTERS, KernelPlan
from attngen.plan.hardware_rules import MOST_WARPGROUPS
from attngen.quantize import HADAMARD_DIMS, SCALE_KINDS
from attngen.schedules import SCHEDULES, WARPGROUP_SCHEDULES
from attngen.spec import INPUTS, PART_STEP, Spec, load

ORDERS = ("auto", "heads", "rows")
SMALL_DIMS = (2, 1, 3, 4, 5, 8, 16)
SMALL_BLOCKS = (2, 1, 3, 4, 8, 16)
GPU_DIMS = (
    (32, 32),
    (40, 40),
    (64, 64),
    (80, 80),
    (96, 96),
    (128, 128),
    (192, 192),
    (256, 256),
    (192, 128),
    (40, 64),
)
DIMS_8BIT = ((64, 64), (32, 32), (80, 80), (96, 96), (128, 128), (256, 256), (192, 128), (48, 64))
SMALL_DIMS_8BIT = (16, 32, 64)
SMALL_BLOCKS_8BIT = (16, 32, 48, 128, 160)
"""Keys; the fragment order of V comes in units of 16, and scales change at 128."""
MOST_BLOCKS = 5
"""Blocks of keys or rows in the longest sequence: enough for every range to hold several."""
LONGEST = 260
"""And most keys or rows in it, give or take one: the fp64 reference holds all scores of all heads."""


@lru_cache(maxsize=4096)
def plan_of(spec: Spec) -> KernelPlan | None:
    """The spec's plan on its own target, or None where it has none."""
    try:
        return lower(spec, ARCHS[spec.target]).attention
    except SpecError:
        return None


# ---- specs --------------------------------------------------------------------------------------------
def _kinds(arch: Arch) -> tuple[str, ...]:
    """The schedules of a target; on a GPU those of warpgroups more often, for other targets have the rest."""
    if not arch.wgmma:
        return tuple(SCHEDULES)
    return (*SCHEDULES, *WARPGROUP_SCHEDULES, *(2 * tuple(WARPGROUP_SCHEDULES) if arch.emits else ()))


@st.composite
def _workers(draw: DrawFn, kind: str, arch: Arch) -> dict[str, int]:
    """How many warps or warpgroups share the rows, first of all, and how they go about it."""
    if kind in SCHEDULES:
        return {"warps": draw(st.sampled_from((1, 2, 4, 8) if arch.has_mma_granularity else (1, 2)))}
    return {
        "warpgroups": draw(st.integers(1, MOST_WARPGROUPS)),
        "overlap": draw(st.booleans()),
        "persistent": draw(st.booleans()),
    }


def _rows(kind: str, arch: Arch) -> SearchStrategy[int]:
    """Rows of one warp or warpgroup."""
    if not arch.has_mma_granularity:
        return st.sampled_from(SMALL_BLOCKS)
    if kind in SCHEDULES or arch.wgmma is None:
        return st.sampled_from((arch.mma.m, 2 * arch.mma.m))
    return st.just(arch.wgmma.m)


def _formats(arch: Arch, kind: str) -> tuple[str, ...]:
    """Formats of inputs: e4m3, of warpgroups alone, twice as often as each other one."""
    wider = tuple(each for each in reversed(arch.input_dtypes) if each != "e4m3")
    if kind in SCHEDULES or "e4m3" not in arch.input_dtypes:
        return wider
    return (*wider, "e4m3", "e4m3")


@st.composite
def _scales(draw: DrawFn, head_dim_qk: int) -> dict[str, object]:
    """What `precision` says of e4m3 inputs alone."""
    chosen: dict[str, object] = {
        "scales": draw(st.sampled_from(("auto", *SCALE_KINDS))),
        "promote": draw(st.sampled_from(("auto", 0, 1))),
    }
    if head_dim_qk in HADAMARD_DIMS and draw(st.booleans()):
        chosen |= {"incoherent": "hadamard", "seed": draw(st.integers(0, 2**16))}
    return chosen


def _splits(block_n: int) -> SearchStrategy[object]:
    """How keys are cut into parts, which are whole blocks."""
    return st.sampled_from(("none", "none", "auto", {"keys": math.lcm(PART_STEP, block_n)}))


def _caches(keys: str) -> SearchStrategy[dict[str, str]]:
    """What `precision` says of a cache, for one spec in three."""
    scales = [each for each in CACHE_SCALES if each != "per_page" or keys == "paged"]
    in_e4m3 = st.sampled_from(("auto", *scales)).map(lambda kind: {"cache": "e4m3", "scales": kind})
    return st.one_of(st.just({}), st.just({}), in_e4m3)


@st.composite
def _specs_of(draw: DrawFn, target: str, backward: bool, is_cut: bool) -> Spec:
    """A spec for a target, one in four or all with a backward pass; its tiles may be too large for it.

    All sequences are dense, or with `is_cut` some have lengths of their own; then nothing is left to `auto`, which may
    choose otherwise for dense ones.
    """
    arch = ARCHS[target]
    kind = draw(st.sampled_from(_kinds(arch)))
    workers = draw(_workers(kind, arch))
    formats = [name for name in _formats(arch, kind) if name != "e4m3" or not (backward or is_cut)]
    inputs = draw(st.sampled_from(formats))
    if inputs == "e4m3" and arch.has_mma_granularity:
        qk, v = draw(st.sampled_from(DIMS_8BIT))
        block_n = 32 * draw(st.sampled_from((2, 1, 3, 4, 5)))
    elif inputs == "e4m3":
        qk, v = draw(st.sampled_from(SMALL_DIMS_8BIT)), draw(st.sampled_from(SMALL_DIMS_8BIT))
        block_n = draw(st.sampled_from(SMALL_BLOCKS_8BIT))
    elif arch.has_mma_granularity:
        qk, v = draw(st.sampled_from(GPU_DIMS))
        block_n = arch.mma.k * draw(st.sampled_from((1, 2, 3, 4, 6)))
    else:
        qk, v = draw(st.sampled_from(SMALL_DIMS)), draw(st.sampled_from(SMALL_DIMS))
        block_n = draw(st.sampled_from(SMALL_BLOCKS))
    block_m = draw(_rows(kind, arch)) * next(iter(workers.values()))
    stages = 1 if kind == "serial" else draw(st.integers(1, 4))
    schedule: dict[str, object] = {
        "kind": kind,
        "stages": stages,
        "order": draw(st.sampled_from(ORDERS)),
        **workers,
    }
    numbers: dict[str, object] = {"tile": {"block_m": block_m, "block_n": block_n}, "schedule": schedule}
    if arch.has_mma_granularity and not is_cut and draw(st.integers(0, 7)) == 7:
        numbers = {"schedule": {"kind": kind}}  # what `auto` stands for
    has_gradients = backward or (inputs != "e4m3" and draw(st.integers(0, 3)) == 3)
    sink = draw(st.sampled_from(("none", "none", "per_head")))
    of_sink = [SINK] if sink != "none" and draw(st.booleans()) else []
    gradients = [*INPUTS, *of_sink] if has_gradients else []
    is_fa2 = kind == "fa2" and not gradients  # which alone knows caches of e4m3
    has_pages = kind != "serial" and not gradients and inputs != "e4m3"
    cut = draw(draw_cuts.kinds(has_pages)) if is_cut else {}
    split = draw(_splits(block_n)) if has_pages and is_cut else "none"
    if split != "none" and "persistent" in workers:
        schedule["persistent"] = False
    cache = {}
    if (
        is_cut
        and is_fa2
        and inputs in ("f16", "bf16")
        and not (arch.has_mma_granularity and (qk % 16 or v % 16))
    ):
        cache = draw(_caches(cut.get("keys", "dense"))) if arch.converts_e4m3 else {}
    by_token = [LETTERS[axis] for axis in LETTERS if cut.get(axis) == "ragged"]
    data = {
        "target": target,
        "problem": {"head_dim": {"qk": qk, "v": v}, **cut},
        "precision": {"inputs": inputs, **(draw(_scales(qk)) if inputs == "e4m3" else cache)},
        **draw(pair_texts(may_be_huge=not gradients, by_token=by_token)),
        **draw(given_blocks(block_m, block_n)),
        **numbers,
        "sink": sink,
        "gradients": gradients,
        "deterministic": not gradients or draw(st.sampled_from((True, True, False))),
        "split": split,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpecWarning)  # a mask that shows nothing is as good as others
        return load(data)


def specs(targets: Sequence[str], backward: bool = False, is_cut: bool = False) -> SearchStrategy[Spec]:
    """Specs that have a plan on one of the targets.

    With `backward` all of them ask for gradients, with `is_cut` all have sequences with lengths of their own.
    """
    drawn = [_specs_of(target, backward, is_cut) for target in targets]
    return st.one_of(drawn).filter(lambda spec: plan_of(spec) is not None)


# ---- problems -----------------------------------------------------------------------------------------
@st.composite
def lengths(draw: DrawFn, block: int, may_be_empty: bool = False) -> int:
    """A length at a multiple of 8, 16 or the block, or one beside it; 0 is one less than 1."""
    longest = max(8, min(MOST_BLOCKS * block, LONGEST))
    units = [unit for unit in (1, block, 8, 16) if unit <= longest]
    unit = draw(st.sampled_from((*units, 0, 0) if may_be_empty else units))
    count = draw(st.integers(1, min(longest // unit, 2 * MOST_BLOCKS))) if unit else 0
    return unit * count + draw(st.sampled_from((0, 1, -1))) if unit else 0


@st.composite
def cases(draw: DrawFn, drawn_specs: SearchStrategy[Spec], rules: Sequence[str] = tuple(RULES)) -> Case:
    """A spec and a problem for it."""
    spec = draw(drawn_specs)
    plan = plan_of(spec)
    assert plan is not None  # specs without one are not drawn
    heads_kv = draw(st.sampled_from((1, 2, 3, 1, 2, 3, 1, 2, 3, 0)))
    shape = Shape(
        batch=draw(st.sampled_from((1, 2, 3, 4, 3, 2, 1, 2, 3, 4, 0))),
        heads=heads_kv * draw(st.integers(1, 8)),
        heads_kv=heads_kv,
        seqlen_q=draw(lengths(plan.block_m)),
        seqlen_k=draw(lengths(plan.block_n, may_be_empty=True)),
    )
    if not plan.lengths.are_dense:
        one = {"queries": lengths(plan.block_m), "keys": lengths(plan.block_n, may_be_empty=True)}
        shape = draw(draw_cuts.cut_shapes(plan, shape, one))
    kind = draw(st.sampled_from((*KINDS_WITH_SCALES, "spans") if plan.scales else KINDS))
    scale: float | None
    if kind == "integers":
        scale = draw(st.sampled_from((EXACT_SCALE, -EXACT_SCALE)))
    else:
        scale = draw(st.one_of(st.none(), st.sampled_from((1.0, 0.0, -0.5)), st.floats(-2, 2, width=16)))
    memories: tuple[Memory, ...] = tuple(
        memory
        for memory in MEMORIES
        if memory != "far"
        or (shape.batch > 1 and plan.inputs.bits <= 16 and not (shape.cuts or plan.descales))
    )
    applicable = [name for name in rules if RULES[name].may_hold(spec, plan)]
    applicable += 3 * [name for name in applicable if RULES[name].is_rare]
    return Case(
        spec=spec,
        shape=shape,
        softmax_scale=scale,
        memory=draw(st.sampled_from(memories)),
        layout=draw(st.sampled_from(call_layouts(plan.lengths.keys))),
        kind=kind,
        seed=draw(st.integers(0, 2**16)),
        rule=draw(st.sampled_from(applicable)),
        state=draw(st.sampled_from(tuple(STATES))),
        has_dlse=bool(spec.gradients) and draw(st.booleans()),
    )
