"""The fuzzing of expressions fuzzes: it compiles for a GPU, and finds what is planted."""

import ctypes
import itertools
import math
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attngen.emit.device import used_by
from attngen.emit.lookups import leaves
from attngen.expr import parse_mask, tile_classes, to_cuda
from attngen.expr.tile_classes import TileClasses
from attngen.expr.tree import FALSE, TRUE, Expr
from attngen.fuzz.draw_expressions import DECLARATIONS
from attngen.fuzz.draw_pairs import APPROXIMATED
from attngen.runtime import DiskCache
from tests.effort import profile
from tests.language import classes, elementwise, functions
from tests.language.__main__ import main
from tests.language.classes import Problem, check_classes, fuzz_classes
from tests.language.cpu_probe import CpuProbe, compile_on_cpu
from tests.language.elementwise import MODULE_SIZE, draw_expressions, source_of
from tests.language.functions import EXACT, FAST, Bound, every_exponent, measure, source_of_functions, truth
from tests.language.language import masks_among
from tests.language.probe import plan_that_reads_all
from tests.language.tiles_on_gpu import plan_of_mask, source_of_classes

TARGET = "sm_90a"


def test_the_module_of_a_run_compiles() -> None:
    """200 expressions of all types, each a kernel, without a call that C++ finds ambiguous."""
    drawn = draw_expressions(MODULE_SIZE, seed=1)
    assert len({each.expr for each in drawn}) == MODULE_SIZE
    assert {each.expr.type for each in drawn} == {"bool", "i32", "f32"}
    compiled = DiskCache().get(source_of(drawn, plan_that_reads_all(DECLARATIONS, TARGET)), TARGET)
    assert len(compiled.resources) == MODULE_SIZE


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_text_means_what_torch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled by g++, which stops where an int overflows: 100 expressions, bit by bit."""
    monkeypatch.setattr(elementwise, "Probe", CpuProbe)
    wrong = elementwise.check_elementwise(draw_expressions(100, seed=3), TARGET, seed=3)
    assert not wrong, "\n\n".join(map(str, wrong[:3]))


def test_the_module_of_classes_compiles() -> None:
    """The classes of random masks, with the kernels that fill their tables."""
    plans = [plan_of_mask(mask, TARGET) for mask in masks_among(draw_expressions(60, seed=2))[:12]]
    assert any(plan.tables for plan in plans)
    compiled = DiskCache().get(source_of_classes(plans), TARGET)
    assert len(compiled.resources) == len(plans) + sum(bool(plan.tables) for plan in plans)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_tanh_near_zero_is_a_polynomial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled by g++, which knows neither ex2 nor rcp: as near as is said, where kernels take the polynomial."""
    monkeypatch.setattr(functions, "Probe", CpuProbe)
    monkeypatch.setattr(
        functions, "FAST", {"tanh": Bound(torch.tanh, ulps=27, magnitudes=(2.0**-126, 0.3125))}
    )
    monkeypatch.setattr(functions, "every_exponent", lambda step: every_exponent(step).nan_to_num(1.0))
    step = 2**8 if profile() == "large" else 2**10
    (found,) = functions.measure_functions(TARGET, exact=False, device="cpu", step=step)
    assert found.ok, found


@pytest.mark.parametrize("exact", [True, False])
def test_the_modules_of_functions_compile(exact: bool) -> None:
    """Each function has a kernel."""
    source, _ = source_of_functions(TARGET, exact)
    assert len(DiskCache().get(source, TARGET).resources) == len(EXACT if exact else FAST)


def test_no_tile_is_called_what_it_is_not() -> None:
    """Random masks of the language over random declarations, shapes and tiles."""
    failure = fuzz_classes(300, seed=1)
    assert failure is None, str(failure)


def _claims(classes: TileClasses, may: Expr | None = None, must: Expr | None = None) -> TileClasses:
    return replace(classes, may=may or classes.may, must=must or classes.must, tables=classes.tables)


@pytest.mark.parametrize(("word", "claim"), [("empty", {"may": FALSE}), ("full", {"must": TRUE})])
def test_a_tile_that_is_called_what_it_is_not_is_found(
    word: str, claim: dict[str, Expr], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classes that always claim so are found within a hundred masks, and the mask is made small."""
    monkeypatch.setattr(classes, "tile_classes", lambda mask: _claims(tile_classes(mask), **claim))
    failure = fuzz_classes(100, seed=1)
    assert failure is not None and f"is called {word} and is not" in str(failure)
    assert len(failure.text) < 60 and failure.problem.seqlen_q <= 2


def test_a_range_without_a_value_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A range that ends too early, for every node."""
    monkeypatch.setattr(classes, "index_range", lambda expr: (0, 5))
    with pytest.raises(classes.ClassFailure, match="is said to lie in 0 .. 5"):
        check_classes("q_idx < 3", Problem(9, 9, 2, 2, seed=0))


@pytest.mark.parametrize("bounds", [EXACT, FAST], ids=["in masks", "in scores"])
def test_bounds_hold_for_the_right_value_and_not_for_much_more(bounds: Mapping[str, Bound]) -> None:
    """The nearest f32 is within every bound, and twice the stated error is not."""
    x = every_exponent(step=65_521)
    for name, bound in bounds.items():
        taken, right = truth(bound, x)
        assert measure(name, bound, x, right.float()).ok, name
        off = right + 2 * bound.allowed(taken, right) + torch.finfo(torch.float32).eps * right.abs()
        assert not measure(name, bound, x, off.float()).ok, name


def test_the_command_tells_what_it_tried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many expressions as are asked for, by the seed that is given; the exit code is 1 where a claim fails."""
    monkeypatch.setattr(sys, "argv", ["language", "20", "--seed", "2"])
    assert main() == 0
    assert capsys.readouterr().out == "ok: 20 expressions on cpu, seed 2\n"
    monkeypatch.setattr(classes, "tile_classes", lambda mask: _claims(tile_classes(mask), may=FALSE))
    assert main() == 1
    assert capsys.readouterr().out.startswith("FAILED: 20 expressions on cpu, seed 2\n")


def test_functions_whose_value_is_cudas_own_have_a_bound() -> None:
    """Drawn masks have none of them, and each that an exact text may have is measured."""
    assert set(EXACT) == APPROXIMATED


def test_integers_of_mixed_widths_have_one_type_in_cuda() -> None:
    """Not `min` of an int and an i64, nor of what an int does not hold; an index is clamped where it may be outside."""
    plan = plan_that_reads_all(DECLARATIONS, TARGET)
    text = to_cuda(parse_mask("min(q_idx * q_idx, 5) < kv_idx"), leaves(plan))
    assert text == "kv_idx > min((i64)q_idx * (i64)q_idx, (i64)5)"
    text = to_cuda(parse_mask("min(ids[b, kv_idx], 5) < kv_idx", DECLARATIONS), leaves(plan))
    assert text == "kv_idx > min(read_arg_ids(params, tile.batch, clamp_index(kv_idx, params.seqlen_k)), 5)"
    text = to_cuda(parse_mask("links[h, b]", DECLARATIONS), leaves(plan))
    assert text == "read_arg_links(params, clamp_index(tile.head, 4), clamp_index(tile.batch, 4))"


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_tanh_of_any_multiple_is_near_what_it_means(tmp_path: Path) -> None:
    """Caps from 1e-6 to 1e32, softmax scales of either sign: no coefficient overflows, or vanishes where that shows."""
    library = compile_on_cpu(
        "\n\n".join(used_by("tanh_of_multiple")),
        "float near(float m, float g, float s, float* reach) {"
        " const TanhOfMultiple of = tanh_of_multiple(m, g); *reach = of.reach; return of.near(s); }",
        tmp_path,
    )
    library.near.restype = ctypes.c_float
    reach, met = ctypes.c_float(), 0
    for cap, scale in itertools.product((10.0**n for n in range(-6, 33)), (1e-4, 0.088, -0.088, 1.0, 9.0)):
        multiple, gain = scale / cap, cap * math.log2(math.e)
        for score in (1e-4 * 2.7**n for n in range(19)):  # up to 5700
            arguments = (multiple, gain, score / abs(scale))
            found = library.near(*map(ctypes.c_float, arguments), ctypes.byref(reach))
            right = gain * math.tanh(multiple * arguments[2])
            if arguments[2] <= reach.value:
                assert abs(found - right) <= 2.5e-6 * (abs(right) + 1), (cap, scale, score, found, right)
                met += 1
            else:
                assert gain * 2.0**-22 <= 1e-5 * (abs(right) + 1)  # what 1 - 2 / (1 + e^2x) is off by
    assert met > 2000
