"""Places know what they run along, products follow from that, and nothing asks for a place by its name."""

import ast
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import attngen
from attngen.arch import ARCHS
from attngen.dtypes import BF16, E4M3, F32
from attngen.errors import InternalError
from attngen.lower import lower
from attngen.plan import ROWS_OF_K, ROWS_OF_O, ROWS_OF_Q, ROWS_OF_V, SCORES, Buffer, RegTile, Tensor, View
from attngen.plan.steps import Gemm, IssueGemm
from attngen.resources import shipped_specs
from attngen.spec import load

Q, K, V, DO = (
    Buffer(name, BF16, axes, rows, cols, cols).at()
    for name, axes, rows, cols in (
        ("q", ROWS_OF_Q, 64, 32),
        ("k", ROWS_OF_K, 128, 32),
        ("v", ROWS_OF_V, 128, 48),
        ("do", ROWS_OF_O, 64, 48),
    )
)
PRODUCTS = {
    "S = Q Kᵀ": (SCORES, (64, 128), Q, K, (False, True), 32),
    "O = P V": (ROWS_OF_O, (64, 48), "p", V, (False, False), 128),
    "dP = dO Vᵀ": (SCORES, (64, 128), DO, V, (False, True), 48),
    "dQ = dS K": (ROWS_OF_Q, (64, 32), "p", K, (False, False), 128),
    "dV = Pᵀ dO": (ROWS_OF_V, (128, 48), "p", DO, (True, False), 64),
    "dK = dSᵀ Q": (ROWS_OF_K, (128, 32), "p", Q, (True, False), 64),
}
"""By what they are: axes and sizes of the product, operands ("p": scores in registers), which of them enter
transposed, how many elements are contracted."""


@pytest.mark.parametrize("kind", [Gemm, IssueGemm])
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_follows_from_axes(kind: type[Gemm], name: str) -> None:
    """Forward and backward, which axis is contracted and which operand is transposed is read off the places."""
    axes, (rows, cols), a, b, transposed, depth = PRODUCTS[name]
    p = RegTile("p", BF16, SCORES, 64, 128, 128, "a_fragment")
    step = kind(
        RegTile("acc", F32, axes, rows, cols, cols, "accumulator"), a if isinstance(a, View) else p, b, True
    )
    assert (step.a_is_transposed, step.b_is_transposed) == transposed
    assert step.depth == depth
    assert step.contracted not in axes


def test_a_transposed_operand_is_no_other_product() -> None:
    """V whose rows are columns gives the same O, its columns being contracted."""
    p = RegTile("p", E4M3, SCORES, 64, 128, 128, "a_fragment")
    acc = RegTile("acc_o", F32, ROWS_OF_O, 64, 48, 48, "accumulator")
    v = Buffer("v", E4M3, ROWS_OF_V[::-1], 48, 128, 128)
    step = IssueGemm(acc, p, v.at(), starts_at_zero=False)
    assert (step.b_is_transposed, step.depth) == (True, 128)
    assert str(step) == "issue acc_o += p vᵀ"
    assert (v.is_transposed, v.sequence_extent) == (True, 128)


def test_operands_that_do_not_fit_are_refused() -> None:
    """No product has rows that neither operand has, or none to contract."""
    acc = RegTile("acc", F32, ROWS_OF_O, 64, 48, 48, "accumulator")
    for a, b in ((Q, V), (Q, K), (K, V), (Q, Q)):
        with pytest.raises(InternalError, match="not the axes of a product"):
            Gemm(acc, a, b, starts_at_zero=True)
    with pytest.raises(InternalError, match=r"acc \('v_columns', 'queries'\)"):
        Gemm(replace(acc, axes=acc.axes[::-1]), DO, V, starts_at_zero=True)


def test_a_tensor_knows_its_sequence() -> None:
    """It is found in either order of rows and columns."""
    v = Tensor("v", E4M3, ROWS_OF_V, 48, "kv")
    assert (v.axis, v.is_transposed) == ("keys", False)
    transposed = replace(v, axes=ROWS_OF_V[::-1])
    assert (transposed.axis, transposed.is_transposed) == ("keys", True)


def place_names() -> set[str]:
    """The names of all places of the shipped specs' kernels."""
    names: set[str] = set()
    for spec in map(load, shipped_specs()):
        for plan in lower(spec, ARCHS[spec.target]).programs:
            places = [*plan.reads, *plan.writes, *plan.scratch, *plan.buffers, *plan.rings, *plan.scales]
            for role in plan.roles:
                places += [role, *role.reg_tiles, *role.reg_vecs, *role.cursors]
            names |= {place.name for place in places}
    return names


def compared_names(path: Path) -> Iterator[str]:
    """The texts that a `.name` of something is compared with in a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(isinstance(side, ast.Attribute) and side.attr == "name" for side in sides):
                texts = (each for side in sides for each in ast.walk(side) if isinstance(each, ast.Constant))
                yield from (str(each.value) for each in texts)


def test_nothing_asks_for_a_place_by_its_name() -> None:
    """What a place is, it says itself: no module compares the name of a place with a text."""
    names = place_names()
    assert {"q", "out", "acc_s", "row_max", "k_at", "producer", "v_descale"} <= names
    asked = {
        str(path): found
        for path in Path(attngen.__file__).parent.rglob("*.py")
        if (found := names & set(compared_names(path)))
    }
    assert asked == {}


def test_no_kernel_is_taken_for_the_first() -> None:
    """A call has kernels of several kinds: none is the one by standing first."""
    for path in Path(attngen.__file__).parent.rglob("*.py"):
        assert "kernels[0]" not in path.read_text(encoding="utf-8"), path
