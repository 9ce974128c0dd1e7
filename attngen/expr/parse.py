"""Text to tree: masks and scores, with all faults of a text and of the definitions it calls in one report."""

from collections.abc import Mapping
from functools import cache

from attngen.expr.arithmetic import to_f32
from attngen.expr.declarations import NO_DECLARATIONS, Declarations
from attngen.expr.operators import MAX_NODES, WORDS
from attngen.expr.resolve import Reader, Work
from attngen.expr.scope import LocateOf, global_scope, prelude
from attngen.expr.syntax import MAX_LENGTH, Fragment, Locate, Report, parse
from attngen.expr.text import to_text
from attngen.expr.tree import Expr, free_names, name, nodes

_MOST_KEPT = 128
_READ_LATELY: dict[tuple[object, ...], Expr] = {}
"""Trees by their texts and what these may name: a spec's are read when it is judged and when it is lowered."""


def parse_mask(
    text: str,
    declarations: Declarations = NO_DECLARATIONS,
    locate: Locate | None = None,
    *,
    locate_of: LocateOf | None = None,
) -> Expr:
    """The condition under which a query sees a key.

    Args:
        text: the condition, `causal` or `window(128, 0) and document(ids)`.
        declarations: what the text may name beside the prelude.
        locate: where the characters of the text stand; by default in a file called `<mask>`.
        locate_of: the same for the texts of definitions, by their names.

    Raises:
        ExpressionError: with every fault of the text.
    """
    return _parse("mask", text, declarations, locate, locate_of)


def parse_score(
    text: str,
    declarations: Declarations = NO_DECLARATIONS,
    locate: Locate | None = None,
    *,
    locate_of: LocateOf | None = None,
) -> Expr:
    """The score of a query and a key after its modification, an f32: `softcap(score, 30.0) + alibi(slopes)`.

    The arguments are those of `parse_mask`; the text may also read `score`.

    Raises:
        ExpressionError: with every fault of the text.
    """
    return _parse("score", text, declarations, locate, locate_of)


def ignores_score(expr: Expr) -> bool:
    """Whether a score says the same whatever q and k are, which is legal and seldom meant."""
    return "score" not in free_names(expr)


@cache
def definitions() -> Mapping[str, Expr]:
    """What each definition of the prelude that has no parameters stands for."""
    return {
        each.name: _parse("definition", each.name, NO_DECLARATIONS, None, None)
        for each in prelude().values()
        if not each.parameters
    }


def _parse(
    title: str, text: str, declarations: Declarations, locate: Locate | None, locate_of: LocateOf | None
) -> Expr:
    declared = (declarations.scalars, declarations.tensors, declarations.definitions)
    key = (title, text, *(tuple(each.items()) for each in declared))
    if (known := _READ_LATELY.get(key)) is None:
        known = _read(title, text, declarations, locate, locate_of)
        if len(_READ_LATELY) >= _MOST_KEPT:
            _READ_LATELY.clear()
        _READ_LATELY[key] = known
    return known


def _read(
    title: str, text: str, declarations: Declarations, locate: Locate | None, locate_of: LocateOf | None
) -> Expr:
    report = Report()
    fragment = Fragment(title, text, locate, report)
    scope = global_scope(declarations, report, locate_of)
    if title == "score":
        scope = scope.binding({"score": name("score")})
    syntax = parse(fragment)
    expr = None if syntax is None else Reader(Work(), fragment, scope).read(syntax, 0)
    if expr is not None:
        _check(title, expr, fragment)
    report.raise_faults()
    assert expr is not None  # a text without a tree has faults
    return to_f32(expr) if title == "score" else expr


def _check(title: str, expr: Expr, fragment: Fragment) -> None:
    expected = {"mask": "a condition", "score": "a number"}.get(title)
    if expected and (expr.type == "bool") != (title == "mask"):
        fragment.fault("expression-types", f"must be {expected}", note=f"this is {WORDS[expr.type]}")
    if len(nodes(expr)) > MAX_NODES:
        fragment.fault("expression-size", f"means a tree of more than {MAX_NODES} nodes")
    elif (length := len(to_text(expr))) > MAX_LENGTH:  # every text that is written can be read
        message = f"means {length} characters of canonical text; at most {MAX_LENGTH} are read"
        fragment.fault("expression-size", message)
