"""How much a mask and a score may weigh: large ones are called and not copied, larger ones refused by their count."""

import time

import pytest

from attngen.arch import ARCHS
from attngen.emit import emit
from attngen.errors import PlanError
from attngen.expr import LARGEST_INLINE, LARGEST_KERNEL, parse_mask, tile_classes, weight
from attngen.plan import KernelPlan
from attngen.runtime import compile_source
from attngen.spec import load
from tests.plans import kernel_plan

SECONDS = 10.0


def plan_of(target: str = "sm_90a", **texts: object) -> KernelPlan:
    """The plan of a mask, a score and tensors."""
    return kernel_plan(load({"problem": {"head_dim": 64}, **texts}), ARCHS[target])


def documents(count: int) -> str:
    """Blocks of many sizes, each with two divisions."""
    return " or ".join(f"kv_idx // {i + 3} == q_idx // {i + 3}" for i in range(count))


def test_what_is_light_is_written_out_and_what_is_heavy_stands_once() -> None:
    """A function of its own for each of mask, may, must and score beyond the weight; none in an ordinary kernel."""
    assert "__noinline__" not in emit(plan_of(mask="window(128, 0)", score="softcap(score, 30.0)"))
    light, heavy = documents(4), documents(40)
    assert weight(parse_mask(light)) < LARGEST_INLINE < weight(parse_mask(heavy))
    text = emit(plan_of(mask=heavy, score="score" + "".join(f" + sin(score * {i}.5)" for i in range(9))))
    for function in ("bool is_visible", "bool may_see", "bool must_see", "float modified_score"):
        assert f"static __device__ __noinline__ {function}(" in text
    assert "DEV bool is_visible(" in emit(plan_of(mask=light))


@pytest.mark.parametrize(
    "texts",
    [
        {"mask": documents(200)},
        {"score": "score" + "".join(f" + sin(f32(kv_idx) * {i}.5)" for i in range(90))},
        {
            "mask": " or ".join(f"t[b, kv_idx + {i}] == t[b, q_idx + {i}]" for i in range(8)),
            "tensors": {"t": "i32[batch, seqlen_k]"},
        },
    ],
    ids=["200 alternatives", "90 sines", "16 tables"],
)
def test_the_largest_legal_kernels_compile_in_time(texts: dict[str, object]) -> None:
    """Ten seconds of one core; 40 alternatives took 12, and 200 more than two minutes, when each pair had a copy."""
    source = emit(plan_of(**texts))
    start = time.process_time()
    compile_source(source, "sm_90a")
    assert time.process_time() - start < SECONDS


@pytest.mark.parametrize(
    ("path", "texts"),
    [
        ("mask", {"mask": " or ".join(f"sin(f32(q_idx - kv_idx) * {i}.5) < 0.5" for i in range(200))}),
        (
            "mask",
            {
                "mask": " or ".join(f"t[b, kv_idx + {i}] == t[b, q_idx + {i}]" for i in range(40)),
                "tensors": {"t": "i32[batch, seqlen_k]"},
            },
        ),
        ("score", {"score": " + ".join(f"cos(sin(sin(score * {i}.5)))" for i in range(60))}),
    ],
)
def test_what_nobody_would_wait_for_is_refused_by_its_count(path: str, texts: dict[str, object]) -> None:
    """With the count that would do; on the simulator, which compiles nothing, it is legal."""
    with pytest.raises(PlanError) as caught:
        plan_of(**texts)
    (fault,) = caught.value.diagnostics
    assert (fault.path, fault.rule, fault.nearest) == (
        path,
        "expression-weight",
        (f"{LARGEST_KERNEL:,} instructions",),
    )
    assert int(str(fault.value)) > LARGEST_KERNEL
    plan_of("simulator", **texts)


def test_choices_of_choices_are_classed_in_time() -> None:
    """Each narrows the tile in one of its branches, so that parts of the tile double with every choice."""
    lets = "".join(
        f"let x{i} = (x{i - 1} + {i} if kv_idx < {10 * i} else x{i - 1}) in " for i in range(1, 40)
    )
    start = time.process_time()
    classes = tile_classes(parse_mask(f"let x0 = q_idx in {lets}x39 < kv_idx"))
    assert weight(classes.may, classes.must) < 10 * LARGEST_KERNEL and time.process_time() - start < 2


def test_conditions_that_alternate_are_classed_in_time() -> None:
    """Each comparison of conditions doubles the ways through those before it, of which only so many are followed."""
    count = 16
    mask = "(" * count + "b < 1" + "".join(f") != (kv_idx < {9 * i})" for i in range(count))
    began = time.process_time()
    plan = plan_of("simulator", mask=mask)
    assert time.process_time() - began < SECONDS and plan.tile_classes is not None
