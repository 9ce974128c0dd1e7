"""Random texts of the expression language, each well typed and each of its divisors provably not 0.

Integers stay far within the range of an index, and real numbers finite where score and tensors are, so that a text
can be run as well as read.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from hypothesis import strategies as st

from attngen.expr import INDEX_NAMES, NO_DECLARATIONS, VALUE_TYPES, Declarations, Scalar, TensorType

T = TypeVar("T")

DECLARATIONS = Declarations(
    scalars={
        "cap": Scalar("cap", "f32", 30.0),
        "width": Scalar("width", "i32", 3),
        "flag": Scalar("flag", "bool", True),
    },
    tensors={
        "ids": TensorType("ids", "i32", ("batch", "seqlen_k")),
        "kinds": TensorType("kinds", "u8", ("batch", "seqlen_q")),
        "links": TensorType("links", "bool", (4, 4)),
        "slopes": TensorType("slopes", "f32", ("num_heads_q",)),
        "table": TensorType("table", "bf16", (8, "num_heads_q")),
        "bias": TensorType("bias", "f16", ("num_heads_kv", "rows", "seqlen_k")),
    },
)
"""A declaration of every type."""

_DEPTH = 3  # operators within operators; four levels of factors up to 64 keep an integer below 2^60
_SMALL = st.integers(0, 12)
_POSITIVE = st.integers(1, 64)
_REALS = st.sampled_from(["0.0", "0.5", "1.0", "2.5", "30.0", "1e-3", "0.1"])
_COMPARATORS = st.sampled_from(["<", "<=", ">", ">=", "==", "!="])
_NATURAL = {
    "batch": ["b"],
    "num_heads_q": ["h"],
    "num_heads_kv": ["h_kv"],
    "seqlen_q": ["q_idx"],
    "seqlen_k": ["kv_idx", "q_pos"],
    "tokens_q": ["q_idx"],
    "tokens_k": ["kv_idx", "q_pos"],
}


def masks(declarations: Declarations = NO_DECLARATIONS, depth: int = _DEPTH) -> st.SearchStrategy[str]:
    """Texts of masks that may read the declared scalars and tensors."""
    return _texts("bool", declarations, depth)


def scores(declarations: Declarations = NO_DECLARATIONS, depth: int = _DEPTH) -> st.SearchStrategy[str]:
    """Texts of scores, most of which read `score`."""
    return _texts("f32", declarations, depth)


def integers(declarations: Declarations = NO_DECLARATIONS, depth: int = _DEPTH) -> st.SearchStrategy[str]:
    """Texts of i32, each as the argument of `f32`, so that it can stand for a score."""
    return _texts("i32", declarations, depth)


@st.composite
def _texts(draw: st.DrawFn, type: str, declarations: Declarations, depth: int) -> str:
    """Perhaps a few names by `let`, then an expression that may read them."""
    writer = _Writer(draw, declarations, reads_score=type == "f32")
    lets = ""
    for number in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        kind = draw(st.sampled_from(["bool", "i32", "f32"]))
        lets += f"let v{number} = {writer.write(kind, 1)} in "
        writer.names[kind].append(f"v{number}")
    text = writer.write(type, depth)
    return lets + (f"f32({text})" if type == "i32" else text)


class _Writer:
    """Draws expressions of the three types.

    Attributes:
        names: what may be read, by type.
    """

    def __init__(self, draw: st.DrawFn, declarations: Declarations, *, reads_score: bool) -> None:
        self._draw = draw
        self._tensors = list(declarations.tensors.values())
        self.names: dict[str, list[str]] = {
            "bool": ["causal", "full", "true", "false"],
            "i32": [*INDEX_NAMES, "q_pos", "kv_idx", "q_idx"],  # the two that matter most are drawn most
            "f32": ["score"] * 3 if reads_score else [],
        }
        for each in declarations.scalars.values():
            self.names[each.type].append(each.name)

    def write(self, type: str, depth: int) -> str:
        """An expression that can be an operand: a name, a literal, a call, or one in brackets."""
        kinds: dict[str, Sequence[Callable[[int], str]]] = {
            "bool": (
                self._comparison,
                self._comparison,
                self._logic,
                self._agreement,
                self._prelude,
                self._choice_of("bool"),
            ),  # fmt: skip
            "i32": (self._sum, self._multiple, self._quotient, self._integer_call, self._choice_of("i32")),
            "f32": (self._real_sum, self._ratio, self._real_call, self._converted, self._choice_of("f32")),
        }
        is_leaf = depth == 0 or self._draw(st.integers(0, 3)) == 0
        if is_leaf and type == "bool" and self._draw(st.booleans()):
            return self._comparison(0)
        return self._leaf(type, depth) if is_leaf else self._of(kinds[type])(depth - 1)

    def _leaf(self, type: str, depth: int) -> str:
        tensors = [each for each in self._tensors if VALUE_TYPES[each.dtype] == type]
        if tensors and self._draw(st.integers(0, 2)) == 0:
            return self._lookup(self._of(tensors), depth)
        literals = {"bool": st.nothing(), "i32": _SMALL.map(str), "f32": _REALS}[type]
        names = self.names[type]
        return str(self._draw(st.sampled_from(names) | literals if names else literals))

    def _lookup(self, tensor: TensorType, depth: int) -> str:
        return f"{tensor.name}[{', '.join(self._index(each, depth) for each in tensor.dims)}]"

    def _index(self, dim: str | int, depth: int) -> str:
        """Mostly an index of that dimension, else any: it is clamped."""
        if depth > 1 and self._draw(st.integers(0, 3)) == 0:
            return self.write("i32", depth - 2)
        if isinstance(dim, int):
            return f"{self._of(self.names['i32'])} % {dim}"
        return self._of(_NATURAL.get(dim, ["q_idx", "kv_idx"]))

    def _choice_of(self, type: str) -> Callable[[int], str]:
        return lambda depth: (
            f"({self.write(type, depth)} if {self.write('bool', depth)} else {self.write(type, depth)})"
        )

    def _comparison(self, depth: int) -> str:
        type = self._of(["i32", "i32", "i32", "f32"])
        operands = [self.write(type, depth) for _ in range(self._of([2, 2, 2, 3]))]
        text = operands[0]
        for operand in operands[1:]:
            text = f"{text} {self._draw(_COMPARATORS)} {operand}"
        return f"({text})"

    def _logic(self, depth: int) -> str:
        if self._draw(st.integers(0, 3)) == 0:
            return f"(not {self.write('bool', depth)})"
        parts = [self.write("bool", depth) for _ in range(self._of([2, 2, 3]))]
        return f"({self._of([' and ', ' or ']).join(parts)})"

    def _agreement(self, depth: int) -> str:
        """Conditions that are compared."""
        return f"({self.write('bool', depth)} {self._of(['==', '!='])} {self.write('bool', depth)})"

    def _prelude(self, depth: int) -> str:
        small, positive = (self._draw(_SMALL) for _ in range(2)), self._draw(_POSITIVE)
        radius, other = small
        documents = [each.name for each in self._tensors if each.dims == ("batch", "seqlen_k")]
        calls = [
            f"window({radius}, {other})",
            f"(causal and (window({radius}, 0) or sinks({other})))",
            f"prefix({self.write('i32', 0)})",
            f"chunked({positive})",
            f"dilated({positive})",
            f"neighbourhood({positive}, {radius})",
            f"block_diffusion({radius + 1}, {positive})",
            *(f"{mask}({ids})" for ids in documents for mask in ("document", "shared_prefix")),
        ]
        return self._of(calls)

    def _sum(self, depth: int) -> str:
        return f"({self.write('i32', depth)} {self._of('+-')} {self.write('i32', depth)})"

    def _multiple(self, depth: int) -> str:
        factor = self._of([f"{self._draw(_POSITIVE)}", f"-{self._draw(_SMALL)}", "(h % 3)"])
        return f"({factor} * {self.write('i32', depth)})"

    def _quotient(self, depth: int) -> str:
        divisor = self._of(
            [f"{self._draw(_POSITIVE)}", f"-{self._draw(_POSITIVE)}", f"max({self.write('i32', 0)}, 1)"]
        )
        return f"({self.write('i32', depth)} {self._of(['//', '%'])} {divisor})"

    def _integer_call(self, depth: int) -> str:
        name = self._of(["abs", "sign", "min", "max", "clamp", "i32"])
        if name == "i32":
            return f"i32({self.write('f32', depth)})"
        count = {"abs": 1, "sign": 1, "clamp": 3}.get(name, 2)
        return f"{name}({', '.join(self.write('i32', depth) for _ in range(count))})"

    def _real_sum(self, depth: int) -> str:
        return f"({self.write('f32', depth)} {self._of('+-*')} {self.write('f32', depth)})"

    def _ratio(self, depth: int) -> str:
        divisor = self._of(["4", "0.3", f"(abs({self.write('f32', 0)}) + 1)"])
        return f"({self.write('f32', depth)} / {divisor})"

    def _real_call(self, depth: int) -> str:
        x = self.write("f32", depth)
        slopes = [each for each in self._tensors if each.dims == ("num_heads_q",)]
        calls = [
            *(f"{name}({x})" for name in ("abs", "sign", "tanh", "sigmoid", "sin", "cos", "floor")),
            f"{self._of(['exp', 'exp2'])}(min({x}, 4))",
            f"{self._of(['log', 'log2'])}(abs({x}) + 1)",
            f"sqrt(abs({x}))",
            f"{self._of(['min', 'max'])}({x}, {self.write('f32', 0)})",
            f"-{x}",
            f"softcap({x}, 30.0)",
            "temperature(0.1, 8)",
            *(f"alibi({each.name})" for each in slopes if VALUE_TYPES[each.dtype] == "f32"),
        ]
        return self._of(calls)

    def _converted(self, depth: int) -> str:
        return self._of([f"f32({self.write('i32', depth)})", f"({self.write('i32', depth)} + 0.5)"])

    def _of(self, choices: Sequence[T]) -> T:
        return self._draw(st.sampled_from(choices))
