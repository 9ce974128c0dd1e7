"""What a drawn spec says of a query and a key: its mask, its score, and declarations of what they read.

Scores are sums of bounded terms, so that the bound on errors means something, and where they choose they choose by
indices alone: a choice by a rounded number may fall otherwise in the kernel than in the reference. For the same
reason no mask has a function that CUDA approximates.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from attngen.errors import ExpressionError
from attngen.expr import (
    Declarations,
    Expr,
    free_names,
    nodes,
    parse_mask,
    parse_score,
    prelude,
    tensor_names,
)
from attngen.expr.declare import read_declarations
from attngen.fuzz import draw_expressions
from attngen.fuzz.names import emitted_names

PairTexts = dict[str, str | dict[str, str]]
"""The keys of a spec from `scalars` to `score`."""

_DECLARED = draw_expressions.DECLARATIONS
_DECLARED_BY_BATCH = {"q": "kinds", "k": "ids"}
"""What has a batch and a length, by the letter of that."""
_NAMES = (*_DECLARED.scalars, *_DECLARED.tensors, "rows")
APPROXIMATED = frozenset(("exp", "exp2", "log", "log2", "tanh", "sin", "cos", "sigmoid"))
"""Functions whose value is CUDA's own, in masks too."""
_WORD = re.compile(r"\b[A-Za-z_]\w*")
_DEPTH = 2
_OFFSETS = st.integers(-9, 9)
_TERMS = (
    "score",
    "0.5 * score",
    "1.25 * score",
    "score / 3",
    "softcap(score, 2.0)",
    "2.0 * sin(score)",
    "max(score, -1.5)",
    "clamp(score, -2.0, 2.0)",
    "score * (0.5 if flag else 1.0)",
    "min(score, cap)",
)
"""What becomes of a score."""
_ADDED = (
    "slopes[h]",
    "bias[h_kv, q_idx, kv_idx]",
    "table[kv_idx % 8, h]",
    "-0.125 * abs(q_pos - kv_idx)",
    "0.0625 * (kv_idx - q_pos)",
    "0.5 * kinds[b, q_idx]",
    "(ids[b, kv_idx] - ids[b, q_pos]) / 8",
    "min(cap, 1.0)",
    "cos(q_idx * 0.1)",
)
"""What may be added to it."""
_HUGE = st.builds("{}e{}".format, st.integers(1, 3), st.integers(3, 38))
"""What models hide padding by, and more: 1e3 to 3e38."""


def _affine(offset: int) -> str:
    return f"{'-' if offset < 0 else '+'} {abs(offset)}"


@st.composite
def _comparisons(draw: DrawFn) -> str:
    """One comparison of the index names with small coefficients."""
    kind = draw(st.sampled_from(("diagonal", "column", "row", "head", "steep")))
    compare = draw(st.sampled_from(("<=", ">=", "<", ">", "==", "!=")))
    offset = _affine(draw(_OFFSETS))
    if kind == "diagonal":
        return f"kv_idx {compare} {draw(st.sampled_from(('q_pos', 'q_idx')))} {offset}"
    if kind == "column":
        return f"kv_idx {compare} {draw(st.sampled_from(('seqlen_k', 'seqlen_q')))} {offset}"
    if kind == "row":
        return f"{draw(st.sampled_from(('q_idx', 'q_pos')))} {compare} {abs(int(offset[2:]))}"
    if kind == "head":
        return f"kv_idx {compare} q_pos + {draw(st.sampled_from(('h', 'h_kv', 'b')))} {offset}"
    return f"{draw(st.integers(1, 3))} * kv_idx {compare} {draw(st.integers(-2, 3))} * q_idx {offset}"


@st.composite
def _windows(draw: DrawFn) -> str:
    """The keys from some steps before the query to some after."""
    left, right = draw(st.integers(0, 20)), draw(st.integers(0, 9))
    return f"kv_idx >= q_pos - {left} and kv_idx <= q_pos + {right}"


@st.composite
def _documents(draw: DrawFn) -> str:
    """Keys by their ids: of the query's own document, or of those before or behind it, alone or within other bounds."""
    compare, place = (
        draw(st.sampled_from(("<=", ">=", "<", ">", "=="))),
        draw(st.sampled_from(("q_pos", "q_idx"))),
    )
    ordered = f"ids[b, kv_idx] {compare} ids[b, {place}] {_affine(draw(st.integers(-2, 2)))}"
    of_kinds = f"ids[b, kv_idx] {compare} kinds[b, q_idx]"
    text = draw(st.sampled_from(("document(ids)", ordered, of_kinds, f"ids[b, kv_idx] {compare} width")))
    return " and ".join([text, *draw(st.lists(st.just("causal") | _windows() | _comparisons(), max_size=2))])


@st.composite
def _formulas(draw: DrawFn) -> str:
    """Up to three comparisons, joined."""
    parts = draw(st.lists(_comparisons(), min_size=1, max_size=3))
    text = parts[0]
    for part in parts[1:]:
        text = f"({text}) {draw(st.sampled_from(('and', 'or')))} ({part})"
    return f"not ({text})" if draw(st.booleans()) else text


def plain_masks() -> SearchStrategy[str]:
    """`full`, `causal`, windows, documents, and formulas that have a closed form or none."""
    return st.one_of(st.just("full"), st.just("causal"), _windows(), _documents(), _formulas(), _formulas())


@st.composite
def _scores(draw: DrawFn, may_be_huge: bool, by_token: Collection[str]) -> str:
    """A bounded function of the score, terms that are added, and perhaps a condition."""
    added = st.sampled_from([_by_token(each, by_token) for each in _ADDED])
    text = " + ".join([draw(st.sampled_from(_TERMS)), *draw(st.lists(added, max_size=2))])
    if draw(st.integers(0, 2)) == 2:
        others = ["-inf", "score", "0.5 * score - 1"]
        if may_be_huge:
            huge = draw(_HUGE)
            others += [f"-{huge}", huge, f"score - {huge}", f"score + {huge}"]
        otherwise = draw(st.sampled_from(others))
        text = f"({text} if {draw(_formulas())} else {otherwise})"
    return text


def _is_exact(mask: Expr) -> bool:
    return not any(each.op == "call" and each.name in APPROXIMATED for each in nodes(mask))


@st.composite
def pair_texts(draw: DrawFn, may_be_huge: bool = True, by_token: Collection[str] = ()) -> PairTexts:
    """A mask, plain more often than not, a score, likewise, and declarations of what they read, of nothing else.

    Of queries ("q") and keys ("k") that are `by_token` there are tensors by token, in place of those by batch. Scores
    are not huge where there are gradients: lse, an f32, says no more what P was, in a row that has no others.
    """
    usual = _declarations({}, by_token)
    mask = draw(st.one_of(*3 * [plain_masks()], draw_expressions.masks(usual, _DEPTH)))
    score = draw(st.one_of(*3 * [st.just("score")], _scores(may_be_huge, by_token)))
    names = draw(_renamings()) if _reads(f"{mask} {score}", _NAMES) else {}
    are_sorted = draw(st.sets(st.sampled_from(("ids", "kinds")))) if not by_token else ()
    mask, score = _renamed(mask, names), _renamed(score, names)
    declared = _declarations(names, by_token, are_sorted)
    trees = _trees(mask, score, declared)
    is_plain = trees is None or not _is_exact(trees[0]) or "score" not in free_names(trees[1])
    if trees is not None and by_token:  # no text is written of trees that look up by token
        is_plain |= not all(map(_is_read, (mask, score), trees, (declared, declared)))
    if is_plain:
        mask, score = "full", "score"
        trees = _trees(mask, score, declared)
    assert trees is not None
    return {
        **_declarations_read_by(declared, *trees),
        "mask": _written(mask, trees[0], declared),
        "score": _written(score, trees[1], declared),
    }


def _renamings() -> SearchStrategy[dict[str, str]]:
    """Other names in the place of the usual ones, or none."""
    taken = {*_NAMES, *prelude(), "v0", "v1"}  # by the texts that are drawn
    others = st.sampled_from([name for name in emitted_names() if name not in taken])
    count = len(_NAMES)
    drawn = st.lists(others, min_size=count, max_size=count, unique=True)
    return st.one_of(st.just({}), drawn.map(lambda found: dict(zip(_NAMES, found, strict=True))))


def _renamed(text: str, names: Mapping[str, str]) -> str:
    return _WORD.sub(lambda word: names.get(word[0], word[0]), text)


def _by_token(text: str, letters: Collection[str]) -> str:
    """A declaration, or a term of a score, with tensors by token."""
    for letter in letters:
        text = re.sub(rf"(batch, )?seqlen_{letter}\b", f"tokens_{letter}", text)
        own = _DECLARED_BY_BATCH[letter]
        text = re.sub(rf"\b{own}\[b, ", f"{own}[", text)
    return text


def _reads(text: str, names: Iterable[str]) -> bool:
    return not set(names).isdisjoint(_WORD.findall(text))


def declaration_texts(declarations: Declarations) -> Mapping[str, dict[str, str]]:
    """Scalars and tensors as a spec writes them."""
    return {
        "scalars": {
            each.name: each.type if each.default is None else f"{each.type} = {_value_text(each.default)}"
            for each in declarations.scalars.values()
        },
        "tensors": {each.name: str(each) for each in declarations.tensors.values()},
    }


def _value_text(value: int | float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _declarations(
    names: Mapping[str, str], by_token: Collection[str], are_sorted: Collection[str] = ()
) -> Declarations:
    """What texts may read, by other names; some tensors sorted."""
    tensors = {name: replace(each, is_sorted=name in are_sorted) for name, each in _DECLARED.tensors.items()}
    blocks = {
        block: {
            _renamed(name, names): _renamed(_by_token(text, by_token), names) for name, text in texts.items()
        }
        for block, texts in declaration_texts(replace(_DECLARED, tensors=tensors)).items()
    }
    return read_declarations(blocks["scalars"], blocks["tensors"], {}).declarations


def _trees(mask: str, score: str, declared: Declarations) -> tuple[Expr, Expr] | None:
    """Both as trees; None where a mask's range exceeds what the language takes."""
    try:
        return parse_mask(mask, declared), parse_score(score, declared)
    except ExpressionError:
        return None


def _written(text: str, tree: Expr, declared: Declarations) -> str:
    """The text of a tree, written anew where it names what the tree no longer reads."""
    return text if _is_read(text, tree, declared) else str(tree)


def _is_read(text: str, tree: Expr, declared: Declarations) -> bool:
    """Whether its tree reads all that a text names of what is declared."""
    named = {*_WORD.findall(text)} & {*declared.scalars, *declared.tensors}
    return named <= {*free_names(tree), *tensor_names(tree)}


def _declarations_read_by(declared: Declarations, *trees: Expr) -> Mapping[str, dict[str, str]]:
    """Texts of the declarations that are read."""
    names = {name for tree in trees for name in (*free_names(tree), *tensor_names(tree))}
    return {
        block: {name: text for name, text in texts.items() if name in names}
        for block, texts in declaration_texts(declared).items()
    }
