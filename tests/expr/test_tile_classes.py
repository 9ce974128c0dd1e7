"""Tiles are empty and full only where brute force says so, and exactly where it does for the masks people write."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attngen.expr.arithmetic import call, compare, floor_divide, minus, modulo, over, plus, times, where
from attngen.expr.logic import conjunction, disjunction, negate
from attngen.expr.tile_classes import tile_classes
from attngen.expr.torch_tables import fill_tables
from attngen.expr.torch_value import evaluate
from attngen.expr.tree import TILE_NAMES, Expr, const, lookup, name, real, scalar, tensor_names
from tests.effort import examples

Q, K, B, H, LENGTH_Q, LENGTH_K = map(name, ("q_idx", "kv_idx", "b", "h", "seqlen_q", "seqlen_k"))
Q_POS = minus(plus(Q, LENGTH_K), LENGTH_Q)
N, X = scalar("n", "i32"), scalar("x", "f32")

CAUSAL = compare("<=", K, Q_POS)


def both(*conditions: Expr) -> Expr:
    return conjunction(conditions)


def either(*conditions: Expr) -> Expr:
    return disjunction(conditions)


def window(left: int, right: int) -> Expr:
    return both(compare("<=", minus(Q_POS, const(left)), K), compare("<=", K, plus(Q_POS, const(right))))


def div(x: Expr, c: int) -> Expr:
    return floor_divide(x, const(c))


def mod(x: Expr, c: int) -> Expr:
    return modulo(x, const(c))


def same_document(row: Expr) -> Expr:
    return compare("==", lookup("ids", (B, row), "i32"), lookup("ids", (B, K), "i32"))


def block_diffusion(n: Expr, size: int) -> Expr:
    """Noised tokens before n see their own block and clean tokens of earlier ones; clean ones are block-causal."""
    clean_q, clean_k = compare(">=", Q, n), compare(">=", K, n)
    block_q = where(clean_q, div(minus(Q, n), size), div(Q, size))
    block_k = where(clean_k, div(minus(K, n), size), div(K, size))
    return either(
        both(compare("==", block_q, block_k), negate(clean_q), negate(clean_k)),
        both(compare(">", block_q, block_k), clean_k, negate(clean_q)),
        both(compare(">=", block_q, block_k), clean_k, clean_q),
    )


def classes_of_tiles(
    mask: Expr,
    lengths: tuple[int, int],
    blocks: tuple[int, int],
    scalars: dict[str, Any],
    tensors: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Whether each tile may and must be visible, as the trees say, and whether any and all of its pairs are."""
    sizes = {"batch": 2, "num_heads_q": 2, "num_heads_kv": 1, "seqlen_q": lengths[0], "seqlen_k": lengths[1]}
    classes = tile_classes(mask)
    all_tensors = tensors | fill_tables(classes.tables, sizes, scalars, tensors, *blocks)
    q_tile = torch.arange(-(-lengths[0] // blocks[0]))[:, None]
    kv_tile = torch.arange(-(-lengths[1] // blocks[1]))[None, :]
    call_env = {"b": 1, "h": 1, "h_kv": 0, "seqlen_q": lengths[0], "seqlen_k": lengths[1], **scalars}
    tile_env = call_env | {
        "q_idx.tile": q_tile,
        "kv_idx.tile": kv_tile,
        "q_idx.first": q_tile * blocks[0],
        "kv_idx.first": kv_tile * blocks[1],
        "q_idx.last": (q_tile * blocks[0] + blocks[0]).clamp(max=lengths[0]) - 1,
        "kv_idx.last": (kv_tile * blocks[1] + blocks[1]).clamp(max=lengths[1]) - 1,
    }
    may, must = (
        torch.as_tensor(evaluate(tree, tile_env, all_tensors)).expand(len(q_tile), kv_tile.shape[1])
        for tree in (classes.may, classes.must)
    )
    q_idx, kv_idx = torch.arange(lengths[0])[:, None], torch.arange(lengths[1])[None, :]
    visible = torch.as_tensor(evaluate(mask, call_env | {"q_idx": q_idx, "kv_idx": kv_idx}, tensors)).expand(
        lengths
    )
    padding = (0, -lengths[1] % blocks[1], 0, -lengths[0] % blocks[0])

    def tiled(value: bool) -> torch.Tensor:
        padded = torch.nn.functional.pad(visible, padding, value=value)
        return padded.unflatten(1, (-1, blocks[1])).unflatten(0, (-1, blocks[0]))

    return may, must, tiled(False).any(3).any(1), tiled(True).all(3).all(1)


IDS = {"ids": torch.sort(torch.randint(0, 9, (2, 2048), generator=torch.Generator().manual_seed(3)))[0]}
NEIGHBOURS = both(
    compare("<=", call("abs", minus(div(Q, 16), div(K, 16))), const(3)),
    compare("<=", call("abs", minus(mod(Q, 16), mod(K, 16))), const(2)),
)
IMAGES = {"image": torch.arange(2048).remainder(700).lt(300).expand(2, 2048)}
NOISED = compare("==", compare("<", Q, const(512)), compare("<", K, const(512)))
BLOCKS_APART = minus(div(Q_POS, 64), div(K, 64))
EXACT = {
    "causal": CAUSAL,
    "window": window(300, 3),
    "window and sinks": both(CAUSAL, either(compare("<", K, const(4)), window(200, 0))),
    "window or scalar sinks": either(compare("<", K, N), window(5, 3)),
    "prefix": either(compare("<", K, N), CAUSAL),
    "document": same_document(Q),
    "causal document": both(same_document(Q), compare("<=", K, Q)),
    "chunked": compare("==", div(Q_POS, 192), div(K, 192)),
    "causal chunked": both(CAUSAL, compare("==", div(Q_POS, 192), div(K, 192))),
    "block dilation": compare("==", mod(BLOCKS_APART, 4), const(0)),
    "block dilation, shifted": compare("==", mod(BLOCKS_APART, 5), const(2)),
    "strided global": either(compare("==", mod(K, 256), const(0)), window(100, 100)),
    "strided global, shifted": either(compare("==", mod(K, 300), const(7)), window(100, 100)),
    "stripes": compare("<", mod(K, 512), const(70)),
    "block diffusion": block_diffusion(const(512), 32),
    "block diffusion, astride a tile": block_diffusion(const(500), 32),
    "block diffusion, scalar": block_diffusion(N, 32),
    "neighbourhood": NEIGHBOURS,
    "same modality": compare("==", lookup("image", (B, Q), "bool"), lookup("image", (B, K), "bool")),
    "other modality": compare("!=", lookup("image", (B, Q), "bool"), lookup("image", (B, K), "bool")),
    "both noised or both clean": NOISED,
    "one noised, one clean": negate(NOISED),
    "limit that differs": compare("<=", where(compare("<", K, const(500)), const(900), const(300)), Q),
    "remainders apart": compare(">=", minus(mod(Q, 40), mod(K, 300)), const(30)),
    "remainders never that small": either(compare("<", mod(K, 256), const(0)), window(9, 9)),
    "score-like": compare("<", call("abs", times(real(0.5), call("f32", minus(Q, K)))), real(100.0)),
}  # fmt: skip


@pytest.mark.parametrize("blocks", [(128, 128), (128, 176)], ids=str)
@pytest.mark.parametrize("lengths", [(1000, 1000), (1024, 2048), (2048, 1024), (1536, 1300)], ids=str)
@pytest.mark.parametrize("mask", EXACT)
def test_the_masks_people_write_have_no_tile_too_many(
    mask: str, lengths: tuple[int, int], blocks: tuple[int, int]
) -> None:
    """A tile that may be visible holds a visible pair, and each whose pairs all are is known to be full."""
    may, must, any_visible, all_visible = classes_of_tiles(
        EXACT[mask], lengths, blocks, {"n": 137}, IDS | IMAGES
    )
    assert may.equal(any_visible)
    assert must.equal(all_visible)


RATIOS = {
    "dilated window": (both(compare("==", mod(minus(Q_POS, K), 4), const(0)), window(300, 0)), 1.0),
    "causal strides": (both(CAUSAL, compare("==", mod(K, 300), const(7))), 1.3),
    "causal neighbourhood": (both(NEIGHBOURS, compare("<=", K, Q)), 1.0),
    "jagged neighbourhood": (
        both(
            compare("<=", call("abs", minus(div(Q, 40), div(K, 40))), const(3)),
            compare("<=", call("abs", minus(mod(Q, 40), mod(K, 40))), const(5)),
        ),
        1.05,
    ),
    "every other block before": (both(CAUSAL, compare("==", mod(BLOCKS_APART, 4), const(1))), 1.1),
    "a band of remainders": (both(compare(">=", mod(K, 512), const(300)), compare("<", mod(K, 512), const(320))), 1.0),
    "scaled distance": (compare("<=", times(call("f32", minus(Q_POS, K)), X), real(40.0)), 1.0),
    "product": (compare("<=", times(plus(div(Q, 64), const(1)), div(K, 64)), const(40)), 1.0),
}  # fmt: skip


@pytest.mark.parametrize("mask", RATIOS)
def test_other_masks_visit_few_tiles_too_many(mask: str) -> None:
    """Where intervals lose something, as between two conditions on one key, the loss has a bound."""
    tree, ratio = RATIOS[mask]
    may, must, any_visible, all_visible = classes_of_tiles(
        tree, (2048, 2048), (128, 176), {"n": 137, "x": 0.25}, IDS
    )
    assert not (any_visible & ~may).any() and not (must & ~all_visible).any()
    assert 0 < may.sum() <= ratio * any_visible.sum()


def test_the_conditions_of_common_masks_are_as_short_as_a_person_writes_them() -> None:
    """A corner of the tile decides; nothing is said twice."""
    q_first, q_last, kv_first, kv_last = map(name, TILE_NAMES[:4])
    found = tile_classes(CAUSAL)
    offset = minus(LENGTH_K, LENGTH_Q)
    assert found.may is compare("<=", kv_first, plus(q_last, offset))
    assert found.must is compare("<=", kv_last, plus(q_first, offset))
    found = tile_classes(compare("==", mod(K, 256), const(0)))
    assert found.may is compare("<=", kv_first, times(const(256), div(kv_last, 256)))
    assert tile_classes(compare("<", B, H)).may is tile_classes(compare("<", B, H)).must is compare("<", B, H)


def test_a_table_stands_for_each_lookup_that_differs_within_a_tile() -> None:
    """One for each lookup, by first use, with the indices it depends on; what is uniform is read itself."""
    nested = lookup("weights", (H, lookup("ids", (B, Q), "i32"), K), "f32")
    uniform = lookup("limits", (B,), "f32")
    classes = tile_classes(
        both(compare("<", nested, uniform), same_document(Q), lookup("flags", (K,), "bool"))
    )
    tables = {table.lookup: table for table in classes.tables}
    assert [table.name for table in classes.tables] == [f"extremes{place}" for place in range(4)]
    q_tile, kv_tile = name("q_idx.tile"), name("kv_idx.tile")
    assert tables[nested].reads == "qk" and tables[nested].indices == (B, H, q_tile, kv_tile)
    assert tables[lookup("ids", (B, Q), "i32")].indices == (B, q_tile)
    assert tables[lookup("ids", (B, K), "i32")].reads == "k"
    flags = tables[lookup("flags", (K,), "bool")]
    assert flags.greatest is lookup(f"{flags.name}.hi", (kv_tile,), "bool")
    assert {"limits", flags.name + ".hi"} <= tensor_names(classes.may)
    assert "weights" not in tensor_names(classes.may) | tensor_names(classes.must)


BIAS = lookup("bias", (K,), "f32")
INFINITY = real(float("inf"))


@pytest.mark.parametrize(
    "mask",
    [
        compare("<=", BIAS, INFINITY),
        compare("<=", real(-float("inf")), BIAS),
        compare("==", BIAS, BIAS),
        compare("<=", call("abs", BIAS), INFINITY),
        compare("<=", real(0.0), call("abs", BIAS)),
        compare("<=", call("exp", BIAS), INFINITY),
        compare("<=", call("tanh", BIAS), real(1.0)),
        compare("<=", times(real(0.0), BIAS), real(0.0)),
        compare("<=", real(0.0), call("sqrt", BIAS)),
        compare("<=", call("sqrt", BIAS), real(5.0)),
        compare("<=", where(compare("<", Q, const(1)), BIAS, X), INFINITY),
        compare("<=", real(-9.0), where(compare("<", Q, const(1)), BIAS, X)),
        compare("<=", over(real(1.0), call("f32", minus(times(const(2), K), const(3)))), real(0.5)),
        compare(">=", over(X, call("max", BIAS, real(1.0))), real(5.0)),
        compare("<=", times(call("tanh", call("f32", minus(K, const(2)))), X), real(0.5)),
    ],
)
@pytest.mark.parametrize("element", [float("nan"), float("inf"), -float("inf"), -1.0])
@pytest.mark.parametrize("x", [float("nan"), float("inf"), -1.0])
def test_a_comparison_that_a_nan_makes_false_is_never_full(mask: Expr, element: float, x: float) -> None:
    """Nor is the negation of one that a NaN makes true ever empty."""
    tensors = {"bias": torch.tensor([1.0, element, 1.0, 0.0])}
    for condition in (mask, negate(mask)):
        may, must, any_visible, all_visible = classes_of_tiles(condition, (4, 4), (2, 4), {"x": x}, tensors)
        assert not (any_visible & ~may).any() and not (must & ~all_visible).any()


INTEGERS: st.SearchStrategy[Expr] = st.deferred(lambda: _integers)
REALS: st.SearchStrategy[Expr] = st.deferred(lambda: _reals)
CONDITIONS: st.SearchStrategy[Expr] = st.deferred(lambda: _conditions)
QUERIES = st.sampled_from([Q, K, minus(Q, const(2)), div(K, 2), plus(Q, K), N])
SIGNS = st.sampled_from(["<", "<=", ">", ">=", "==", "!="])


def at_least_one(x: Expr) -> Expr:
    return call("max", x, const(1))


_integers = st.one_of(
    st.sampled_from([Q, K, Q, K, B, H, N, LENGTH_Q, LENGTH_K, Q_POS]),
    st.integers(-6, 6).map(const),
    st.builds(lambda row: lookup("ids", (B, row), "i32"), QUERIES),
    st.builds(lambda operation, a, b: operation(a, b), st.sampled_from([plus, minus, times]), INTEGERS, INTEGERS),
    st.builds(lambda operation, a, c: operation(a, const(c)), st.sampled_from([floor_divide, modulo]), INTEGERS,
              st.sampled_from([-3, -2, 2, 3, 4, 7])),
    st.builds(lambda operation, a, b: operation(a, at_least_one(b)), st.sampled_from([floor_divide, modulo]),
              INTEGERS, INTEGERS),
    st.builds(lambda operation, a, b: operation(a, minus(const(0), at_least_one(b))),
              st.sampled_from([floor_divide, modulo]), INTEGERS, INTEGERS),
    st.builds(call, st.sampled_from(["min", "max"]), INTEGERS, INTEGERS),
    st.builds(call, st.sampled_from(["abs", "sign"]), INTEGERS),
    st.builds(where, CONDITIONS, INTEGERS, INTEGERS),
    st.builds(lambda x: call("clamp", call("i32", x), const(-9), const(9)), REALS),
)  # fmt: skip
_reals = st.one_of(
    st.just(X),
    st.sampled_from([0.0, -0.0, 1.0, -2.5, 0.3, 3e38, float("inf"), -float("inf")]).map(real),
    st.builds(lambda row: lookup("bias", (H, row), "f32"), QUERIES),
    st.builds(lambda x: call("f32", x), INTEGERS),
    st.builds(lambda operation, a, b: operation(a, b), st.sampled_from([plus, minus, times, over]), REALS, REALS),
    st.builds(call, st.sampled_from(["min", "max"]), REALS, REALS),
    st.builds(call, st.sampled_from(["abs", "sign", "floor", "sqrt", "exp", "log", "tanh", "sigmoid", "sin"]), REALS),
    st.builds(where, CONDITIONS, REALS, REALS),
)  # fmt: skip
_conditions = st.one_of(
    st.builds(compare, SIGNS, INTEGERS, INTEGERS),
    st.builds(compare, SIGNS, REALS, REALS),
    st.sampled_from(
        [scalar("flag", "bool"), lookup("flags", (B, K), "bool"), lookup("flags", (B, Q), "bool")]
    ),
    st.lists(CONDITIONS, min_size=2, max_size=3).map(conjunction),
    st.lists(CONDITIONS, min_size=2, max_size=3).map(disjunction),
    st.builds(negate, CONDITIONS),
)


@settings(max_examples=examples(2))
@given(
    CONDITIONS,
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.fixed_dictionaries(
        {
            "n": st.integers(-6, 9),
            "x": st.sampled_from([0.0, 1.5, -3.0, float("inf"), -float("inf"), float("nan")]),
            "flag": st.booleans(),
        }
    ),
    st.randoms(use_true_random=False),
)
def test_no_tile_is_called_what_it_is_not(
    mask: Expr, lengths: tuple[int, int], blocks: tuple[int, int], scalars: dict[str, Any], random: Any
) -> None:
    """Any mask of any types, on tensors with NaN and infinities: empty is empty and full is full."""
    numbers = [0.0, 1.0, -1.0, 2.5, float("nan"), float("inf"), -float("inf"), 1e30]
    tensors = {
        "ids": torch.tensor([[random.randint(-4, 4) for _ in range(7)] for _ in range(2)]),
        "bias": torch.tensor([[random.choice(numbers) for _ in range(7)] for _ in range(2)]),
        "flags": torch.tensor([[random.random() < 0.7 for _ in range(7)] for _ in range(2)]),
    }
    may, must, any_visible, all_visible = classes_of_tiles(mask, lengths, blocks, scalars, tensors)
    assert not (any_visible & ~may).any(), "a tile that is called empty is not"
    assert not (must & ~all_visible).any(), "a tile that is called full is not"
