"""Syntax tree to Expr: names, calls and `let`; operators are in operators.py.

A definition is read anew for each list of arguments and remembered by it, so that doubling through definitions costs
nothing. What grows all the same is stopped: by nesting, of the text and of the tree, and by the number of readings.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from lark import Token, Tree
from lark.tree import Meta

from attngen.expr.arithmetic import FUNCTIONS, call
from attngen.expr.declarations import TensorType
from attngen.expr.operators import MAX_NODES, Formulas, child
from attngen.expr.scope import RESERVED, Closure, Scope, Value, describe, example, nearest_names
from attngen.expr.syntax import Fragment, Syntax
from attngen.expr.tree import Expr, nodes

MAX_NESTING = 100
_MAX_READINGS = 3 * MAX_NODES  # each makes a node or two, or none; a second's work


@dataclass
class Work:
    """What all readings of one text share.

    Attributes:
        readings: how many syntax nodes have been read.
        open: the definitions that are being read, outermost first.
    """

    readings: int = 0
    open: list[Closure] = field(default_factory=list)
    _heights: dict[Expr, int] = field(default_factory=dict)

    def height(self, expr: Expr) -> int:
        """How deep a tree is."""
        for each in nodes(expr, known=self._heights):
            self._heights[each] = 1 + max((self._heights[arg] for arg in each.args), default=0)
        return self._heights[expr]


class Reader(Formulas):
    """Gives a syntax tree its meaning in a scope.

    Attributes:
        caller: of a definition's body, the call that is being read; else empty.
    """

    def __init__(self, work: Work, fragment: Fragment, scope: Scope, caller: str = "") -> None:
        self._work = work
        self._fragment = fragment
        self._scope = scope
        self._caller = caller

    def fault(
        self, rule: str, message: str, at: Meta | Token, note: str = "", nearest: tuple[str, ...] = ()
    ) -> None:
        """Record a fault; of a definition it names the call."""
        self._fragment.fault(rule, message, at=at, note=note, nearest=nearest, call=self._caller)

    def read(self, tree: Syntax, depth: int) -> Expr | None:
        """The meaning of a syntax tree that stands `depth` deep, or None with its faults recorded."""
        self._work.readings += 1
        if self._work.readings > _MAX_READINGS:
            if self._work.readings == _MAX_READINGS + 1:
                self.fault("expression-size", f"means a tree of more than {MAX_NODES} nodes", tree.meta)
            return None
        if depth > MAX_NESTING:
            self.fault("expression-nesting", f"is nested more than {MAX_NESTING} deep here", tree.meta)
            return None
        expr: Expr | None = getattr(self, f"_read_{tree.data}")(tree, depth + 1)
        if expr is None or (expr.type == "i32" and not self._is_in_range(expr, tree.meta)):
            return None
        return expr if self._is_shallow(expr, tree.meta) else None

    def _is_shallow(self, expr: Expr, at: Meta) -> bool:
        if self._work.height(expr) <= MAX_NESTING:
            return True
        self.fault("expression-nesting", f"means a tree more than {MAX_NESTING} deep here", at)
        return False

    def _read_let_value(self, tree: Syntax, depth: int) -> Expr | None:
        return self._read_lets(tree, depth)

    def _read_let_function(self, tree: Syntax, depth: int) -> Expr | None:
        return self._read_lets(tree, depth)

    def _read_lets(self, tree: Syntax, depth: int) -> Expr | None:
        """A chain of lets: however long, it is no nesting."""
        reader, is_legal = self, True
        while tree.data in ("let_value", "let_function"):
            word, *parameters, value, body = tree.children
            assert isinstance(word, Token) and isinstance(value, Tree) and isinstance(body, Tree)
            names = [word, *(token for each in parameters for token in _tokens(each))]
            is_legal = all([reader._may_name(each) for each in names]) and is_legal
            meaning: Value = None
            if not parameters:
                meaning = reader.read(value, depth)
            elif len(set(names[1:])) == len(names[1:]):
                meaning = reader._closure(names, value)
            else:
                reader.fault(
                    "definition-heads", f"has two parameters of one name in `{word}`", child(tree, 1).meta
                )
            scope = reader._scope.binding({str(word): meaning})
            reader = Reader(self._work, self._fragment, scope, self._caller)
            tree = body
        expr = reader.read(tree, depth)
        return expr if is_legal else None

    def _may_name(self, word: Token) -> bool:
        if word in RESERVED:
            note = "it has a meaning of its own"
            self.fault("reserved-names", f"takes `{word}` for a name", word, note, (f"{word}_",))
        return word not in RESERVED

    def _closure(self, names: Sequence[Token], body: Syntax) -> Closure:
        scope = self._scope.without("score")
        return Closure(str(names[0]), tuple(map(str, names[1:])), self._fragment, scope, lambda: body)

    def _read_reference(self, tree: Syntax, depth: int) -> Expr | None:
        word = str(tree.children[0])
        if word in FUNCTIONS:
            note = f"it takes {_count(FUNCTIONS[word].arity, 'argument')}"
            self.fault("function-value", f"takes function `{word}` for a value", tree.meta, note)
            return None
        if word not in self._scope:
            self._tell_unknown(word, tree.meta)
            return None
        value = self._scope[word]
        if isinstance(value, TensorType):
            message = f"takes tensor `{word}` for a value"
            self.fault("tensor-value", message, tree.meta, f"{word} is {value}", (example(word, value),))
            return None
        if not isinstance(value, Closure):
            return value
        if value.parameters:
            message = f"takes function `{word}` for a value"
            self.fault(
                "function-value", message, tree.meta, "a definition with parameters is called", (str(value),)
            )
            return None
        return self._call(value, (), tree, depth)

    def _read_lookup(self, tree: Syntax, depth: int) -> Expr | None:
        word = str(tree.children[0])
        indices = self._operands(tree.children[1:], depth, "i32", "an index")
        if word not in self._scope and word not in FUNCTIONS:
            self._tell_unknown(word, _word(tree), TensorType)
            return None
        tensor = self._scope.get(word)
        if not isinstance(tensor, TensorType):
            if tensor is not None or word in FUNCTIONS:
                self.fault("tensor-index", f"indexes `{word}`, which is {describe(tensor)}", tree.meta)
            return None
        if len(tree.children) - 1 != len(tensor.dims):
            message = f"gives {_count(len(tree.children) - 1, 'index')} to tensor `{word}`"
            note = f"{word} is {tensor}, of {_count(len(tensor.dims), 'dimension')}"
            self.fault("tensor-index", message, tree.meta, note, (example(word, tensor),))
            return None
        return None if indices is None else tensor.at(*indices)

    def _read_call(self, tree: Syntax, depth: int) -> Expr | None:
        word, arguments = str(tree.children[0]), [child(tree, at) for at in range(1, len(tree.children))]
        if word in FUNCTIONS:
            return self._call_function(word, arguments, tree, depth)
        values = [self._argument(each, depth) for each in arguments]
        if word not in self._scope:
            self._tell_unknown(word, _word(tree), Closure)
            return None
        callee = self._scope[word]
        if isinstance(callee, Closure) and callee.parameters:
            if not self._has_arity(str(callee), len(callee.parameters), len(values), tree, callee.required):
                return None
            values += callee.defaults[len(values) - callee.required :]
            return None if None in values else self._call(callee, tuple(values), tree, depth)
        if callee is not None:
            note = "it has no parameters" if isinstance(callee, Closure) else ""
            nearest = (example(word, callee),) if isinstance(callee, TensorType) else (word,)
            self.fault("calls", f"calls `{word}`, which is {describe(callee)}", tree.meta, note, nearest)
        return None

    def _call_function(self, word: str, arguments: list[Syntax], tree: Syntax, depth: int) -> Expr | None:
        function = FUNCTIONS[word]
        if not self._has_arity(word, function.arity, len(arguments), tree):
            return None
        if function.takes == "choice":
            return self._choose(arguments, tree, depth, f"`{word}`")
        operands = self._operands(arguments, depth, "number", f"`{word}`")
        return None if operands is None else call(word, *operands)

    def _has_arity(
        self, callee: str, expected: int, given: int, tree: Syntax, required: int | None = None
    ) -> bool:
        """Whether a call gives as many arguments as are expected, or at least those that are required."""
        least = expected if required is None else required
        if not least <= given <= expected:
            message = f"gives {_count(given, 'argument')} to `{callee}`"
            takes = "" if least == expected else f"{least} to "
            self.fault(
                "call-arguments", message, tree.meta, f"it takes {takes}{_count(expected, 'argument')}"
            )
        return least <= given <= expected

    def _argument(self, tree: Syntax, depth: int) -> Value:
        """What a parameter is bound to: a tensor by its bare name, or a value."""
        if tree.data == "reference":
            value = self._scope.get(str(tree.children[0]))
            if isinstance(value, TensorType):
                return value
        return self.read(tree, depth)

    def _call(self, closure: Closure, values: tuple[Value, ...], tree: Syntax, depth: int) -> Expr | None:
        """The meaning of a definition for these arguments."""
        if closure in self._work.open:
            cycle = [each.name for each in self._work.open[self._work.open.index(closure) :]]
            note = f"{' calls '.join([*cycle, closure.name])}; a definition cannot be recursive"
            self.fault("recursion", f"comes back to `{closure.name}`", tree.meta, note)
            return None
        if values not in closure.readings:
            if closure.body is None:
                return None
            scope = closure.scope.binding(dict(zip(closure.parameters, values, strict=True)))
            caller = f"called as {self._fragment.quote(tree.meta)}"
            self._work.open.append(closure)
            reader = Reader(self._work, closure.fragment, scope, caller)
            closure.readings[values] = reader.read(closure.body, depth)
            self._work.open.pop()
        return closure.readings[values]

    def _tell_unknown(
        self, word: str, at: Meta | Token, kind: type[Closure | TensorType] | None = None
    ) -> None:
        if word == "score":
            note = "a definition reads no score: pass it as an argument" if self._caller else ""
            self.fault(
                "known-names", "reads `score`", at, note or "a mask is decided before there is a score"
            )
            return
        nearest = () if self._fragment.report.is_full else nearest_names(word, self._scope, kind)
        verb = "calls" if kind is Closure else "indexes" if kind else "reads"
        self.fault("known-names", f"{verb} `{word}`", at, "nothing has this name", nearest)


def _tokens(parameters: Syntax | Token) -> list[Token]:
    assert isinstance(parameters, Tree)
    return [each for each in parameters.children if isinstance(each, Token)]


def _word(tree: Syntax) -> Token:
    """The name that a call or a lookup starts with."""
    word = tree.children[0]
    assert isinstance(word, Token)
    return word


def _count(number: int, noun: str) -> str:
    plural = "indices" if noun == "index" else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"
