"""Declared scalars, tensors and dimensions called what trees and emitted texts call something else. Needs no GPU."""

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attngen
from attngen.arch import ARCHS
from attngen.emit import emit_module
from attngen.emit.device import names_in
from attngen.emit.pair_functions import leaves
from attngen.expr import (
    INDEX_NAMES,
    SIZE_NAMES,
    Declarations,
    Scalar,
    TensorType,
    found_of,
    free_names,
    name,
    nodes,
    tensor_names,
    tile_classes,
    to_cuda,
)
from attngen.fuzz.names import emitted_names
from attngen.lower import lower
from attngen.resources import shipped_specs
from attngen.runtime import DiskCache
from attngen.spec import load
from tests.check.language_cases import CASES, LanguageCase
from tests.effort import examples
from tests.language.probe import plan_that_reads_all
from tests.language.probe_sources import elementwise_source

MADE_UP = (
    "q_first",
    "q_last",
    "kv_first",
    "kv_last",
    "q_tile",
    "kv_tile",
    "ahead0_bias",
    "term0_a",
    "extremes0_lo",
)
WALK = "(q_idx + kv_idx) % 5 != 3"
KERNELS = [
    (mask, *kernel)
    for mask in ("true", WALK)
    for kernel in (
        ("sm_80", "serial", "bf16"),
        ("sm_90a", "fa2", "f16"),
        ("sm_90a", "warp_specialized", "bf16"),
        ("sm_90a", "pingpong", "e4m3"),
    )
]


def every_name() -> tuple[str, ...]:
    """Those of emitted texts, and such as a canonical text has of its own."""
    return (*emitted_names(), "x1", "x2")


def parts(place: int, of: int, size: int = 104) -> list[tuple[str, ...]]:
    """Names in parts of so many, those that trees and kernels make up in each: part `place` of every `of`."""
    known = every_name()
    count = -(-len(known) // size)
    return [tuple(dict.fromkeys((*MADE_UP, *known[first::count]))) for first in range(count)][place::of]


def value(name: str) -> int:
    return random.Random(name).randint(-99, 99)


def nothing(names: Iterable[str], index: str = "") -> str:
    """A sum of all, which is 0 where each has its `value`, and hardly ever where one is taken for something else."""
    total = sum((place + 2) * value(name) for place, name in enumerate(names))
    return " + ".join(f"{place + 2} * {name}{index}" for place, name in enumerate(names)) + f" - ({total})"


def kernel(
    mask: str, arch: str, kind: str, number: str, score: str = "score", **declared: Any
) -> attngen.Kernel:
    spec = {"problem": {"head_dim": 64}, "schedule": {"kind": kind}, "precision": {"inputs": number}}
    return attngen.compile(spec | {"mask": mask, "score": score, **declared}, arch=arch)


@cache
def of_scalars(names: tuple[str, ...], mask: str, *fields: str) -> attngen.Kernel:
    """Causal and a mask, if all scalars are what they should be."""
    bound = f"kv_idx <= q_pos + {nothing(names)}"
    return kernel(f"{bound} and {mask}", *fields, scalars=dict.fromkeys(names, "i32"))


def call(made: attngen.Kernel, declared: Mapping[str, Any]) -> torch.Tensor:
    """The simulator's output for two heads of 150 rows and keys."""
    generator = torch.Generator().manual_seed(0)
    number = torch.float16 if made.plan.inputs.name == "f16" else torch.bfloat16
    q, k, v = (torch.randn(1, 150, 2, 64, generator=generator).to(number) for _ in range(3))
    out = made(q, k, v, **declared)
    assert isinstance(out, torch.Tensor)
    return out


@pytest.mark.parametrize(("place", "fields"), [*enumerate(KERNELS)], ids=map(" ".join, KERNELS))
def test_a_scalar_of_any_name_is_the_one_that_is_read(place: int, fields: tuple[str, ...]) -> None:
    """In bounds of rows and of tiles, in classes of tiles, and pair by pair: as without scalars, if all are right."""
    mask, *others = fields
    right = call(kernel(f"causal and {mask}", *others), {})
    for names in parts(place % 4, 4):
        made, values = of_scalars(names, *fields), {name: value(name) for name in names}
        assert torch.equal(call(made, values), right)
        values[names[7]] += 1
        assert not torch.equal(call(made, values), right)


def declared_as(kind: str) -> Iterator[Declarations]:
    """Every name as a scalar, a tensor or a dimension, as many at a time as a mask may read."""
    known = every_name()
    if kind == "scalar":
        for first in range(3):
            yield Declarations(scalars={each: Scalar(each, "i32") for each in known[first::3]})
    elif kind == "tensor":
        for first in range(4):
            yield Declarations(tensors={each: TensorType(each, "i32", (4,)) for each in known[first::4]})
    else:
        dims = {f"_{first}": known[first : first + 8] for first in range(0, len(known), 8)}
        yield Declarations(tensors={each: TensorType(each, "i32", of) for each, of in dims.items()})


@pytest.mark.parametrize(
    ("kind", "member", "read"),
    [
        ("scalar", "arg_{}", "params.arg_{}"),
        ("tensor", "arg_{}", "read_arg_{}(params, clamp_index(q_idx, 4))"),
        ("dimension", "size_of_{}", "clamp_index(q_idx, params.size_of_{})"),
    ],
    ids=["scalar", "tensor", "dimension"],
)
def test_any_name_compiles_and_is_the_one_that_is_read(kind: str, member: str, read: str) -> None:
    """Each is one parameter, which what asks for it reads, and NVRTC takes it."""
    met: set[str] = set()
    for declared in declared_as(kind):
        plan, q_idx = plan_that_reads_all(declared, "sm_90a"), name("q_idx")
        tensors = declared.tensors.values()
        exprs = [scalar.expr for scalar in declared.scalars.values()]
        exprs += [tensor.at(*(q_idx for _ in tensor.dims)) for tensor in tensors]
        names = [*declared.scalars, *declared.tensors]
        if kind == "dimension":
            names = [str(dim) for tensor in tensors for dim in tensor.dims]
        source = elementwise_source(plan, {"probe": exprs})
        text, members = " ".join(to_cuda(each, leaves(plan)) for each in exprs), members_of(source, "Params")
        for each in names:
            assert read.format(each) in text and members[member.format(each)] == 1
        assert DiskCache().get(source, "sm_90a").warnings == ()
        met |= {*names}
    assert met == {*every_name()}


def members_of(source: str, struct: str) -> Counter[str]:
    """The members of a struct of an emitted text, each as often as it is declared."""
    body = re.search(rf"struct {struct} {{\n(.*?)^}}", source, re.DOTALL | re.MULTILINE)
    assert body is not None
    return Counter(re.findall(r"(\w+);", body[1]))


@pytest.mark.parametrize("fields", KERNELS, ids=map(" ".join, KERNELS))
def test_a_tensor_of_any_name_is_the_one_that_is_read(fields: tuple[str, ...]) -> None:
    """By a bound or by tables of extremes, and by the score of a pair: as without tensors, if all are right."""
    mask, *others = fields
    right = call(kernel(f"causal and {mask}", *others), {})
    by_key, by_head = MADE_UP[::2], MADE_UP[1::2]
    made = kernel(
        f"kv_idx <= q_pos + ({nothing(by_key, '[kv_idx]')}) + ({nothing(by_head, '[h]')}) and {mask}",
        *others,
        score=f"score * ({nothing(by_head, '[h]')} + 1.0)",
        tensors=dict.fromkeys(by_key, "i32[seqlen_k]") | dict.fromkeys(by_head, "i32[num_heads_q]"),
    )
    sizes = dict.fromkeys(by_key, 150) | dict.fromkeys(by_head, 2)
    values = {each: torch.full((size,), value(each), dtype=torch.int32) for each, size in sizes.items()}
    assert torch.allclose(call(made, values).float(), right.float(), atol=0.02)
    for changed in (by_key[0], by_head[0]):
        values[changed] += 1
        assert not torch.allclose(call(made, values).float(), right.float(), atol=0.02)
        values[changed] -= 1


def test_the_bound_of_a_tile_is_no_scalar() -> None:
    """A scalar q_last above every row, in a mask that classes tiles by their last row."""
    mask = "causal and (q_idx % 7 == q_last or kv_idx < q_last)"
    made = kernel(mask, "sm_90a", "fa2", "bf16", scalars={"q_last": "i32"})
    assert torch.equal(
        call(made, {"q_last": 40}),
        call(kernel(mask.replace("q_last", "40"), "sm_90a", "fa2", "bf16"), {}),
    )


def test_what_was_looked_up_ahead_is_no_scalar() -> None:
    """A scalar that has the name of the registers of a bias, which both are read."""
    made = kernel(
        "causal",
        "sm_90a",
        "pingpong",
        "bf16",
        "(score + bias[b, h, q_idx, kv_idx]) * ahead0_bias",
        scalars={"ahead0_bias": "f32"},
        tensors={"bias": "bf16[batch, num_heads_q, seqlen_q, seqlen_k]"},
    )
    assert "look_up_ahead0_bias" in made.source and "* params.arg_ahead0_bias;" in made.source
    assert made.compiled.warnings == ()
    bias = torch.randn(1, 2, 150, 150, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = [call(made, {"bias": bias, "ahead0_bias": factor}) for factor in (1.0, 0.0, 3.0)]
    plain = kernel("causal", "sm_90a", "pingpong", "bf16", "0.0 * score")
    assert torch.allclose(found[1].float(), call(plain, {}).float(), atol=0.02)
    assert (found[2] - found[0]).abs().max() > 0.3


def test_names_that_end_in_numbers_stay_apart() -> None:
    """Terms of a tile of which `name` and `number` once met in one member: a1, the first, and a, the eleventh."""
    names = ["a1", *(f"t{i}" for i in range(9)), "a"]
    score = "score" + "".join(f" + {each}[h]" for each in names)
    made = kernel("causal", "sm_90a", "fa2", "bf16", score, tensors=dict.fromkeys(names, "f32[num_heads_q]"))
    assert set(members_of(made.source, "ScoreTerms").values()) == {1}
    assert made.compiled.warnings == ()


IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
PREFIX = re.compile(r"(arg|read_arg|size_of|stride_\d+_of|ahead\d+|look_up_ahead\d+|term\d+)_(\w+)")


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_no_text_can_name_what_a_tree_makes_up(case: LanguageCase) -> None:
    """Bounds of tiles, tables of extremes and values of lookups hold a character that no name has."""
    spec = load(case.spec(problem={"head_dim": 64}))
    classes = tile_classes(spec.mask_expr)
    trees = (classes.may, classes.must)
    declared = {*spec.declarations.scalars, *spec.declarations.tensors}
    made_up = set().union(*map(free_names, trees), *map(tensor_names, trees)) - {*INDEX_NAMES} - declared
    made_up |= {found_of(each).name for each in nodes(spec.mask_expr, spec.score_expr) if each.op == "lookup"}
    assert not any(map(IDENTIFIER.fullmatch, made_up))


def test_no_other_identifier_begins_like_a_declared_one() -> None:
    """What the shipped specs emit: such an identifier ends in a name of the spec, or in a size that tables want."""
    met = set()
    for path in shipped_specs():
        spec = load(path)
        if not ARCHS[spec.target].emits:
            continue
        text = "".join(map(emit_module, lower(spec, ARCHS[spec.target]).modules.values()))
        found = [found for each in names_in(text) if (found := PREFIX.fullmatch(each))]
        met |= {each[1] for each in found}
        declared = {*spec.declarations.scalars, *spec.declarations.tensors, *SIZE_NAMES}
        assert {each[2] for each in found} <= declared
    assert {"arg", "read_arg", "size_of", "stride_1_of", "ahead0", "look_up_ahead0", "term0"} <= met


NASTY = st.text("a_10", min_size=1, max_size=4).filter(IDENTIFIER.fullmatch)


@settings(max_examples=examples(0.5))
@given(st.lists(NASTY, min_size=3, max_size=18, unique=True))
def test_no_two_declared_names_make_one_identifier(names: list[str]) -> None:
    """Scalars, tensors and dimensions of names that differ in a digit or an underscore, and terms of a tile of them."""
    dims, tensors, scalars = names[::3], names[1::3], names[2::3]
    made = kernel(
        "causal",
        "sm_90a",
        "fa2",
        "bf16",
        " + ".join(["score", *(f"{each}[h, 0]" for each in tensors), *scalars]),
        tensors={each: f"f32[num_heads_q, {dim}]" for each, dim in zip(tensors, dims, strict=False)},
        scalars=dict.fromkeys(scalars, "f32"),
    )
    members, terms = members_of(made.source, "Params"), members_of(made.source, "ScoreTerms")
    assert {*members.values(), *terms.values()} == {1} and len(terms) == len(tensors)
    assert {f"arg_{each}" for each in (*tensors, *scalars)} <= members.keys()
    assert len(re.findall(r"^DEV float read_arg_\w+\(", made.source, re.MULTILINE)) == len(tensors)
