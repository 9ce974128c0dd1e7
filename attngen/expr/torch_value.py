"""Tree to value: what an expression is for given indices, integers or tensors. torch is imported late."""

from collections.abc import Callable, Mapping
from functools import lru_cache, reduce
from operator import add, and_, eq, floordiv, le, lt, mod, mul, ne, or_, sub, truediv
from typing import TYPE_CHECKING, Any, Union

from attngen.errors import InternalError
from attngen.expr.given_blocks import ALL_KEPT, GIVEN_BLOCKS, SOME_KEPT
from attngen.expr.tree import Expr, lookup, nodes

if TYPE_CHECKING:
    import torch

Value = Union[int, bool, "torch.Tensor"]


def evaluate(
    expr: Expr,
    env: Mapping[str, "int | float | bool | torch.Tensor"],
    tensors: Mapping[str, "torch.Tensor"] | None = None,
    real: "torch.dtype | None" = None,
) -> Value:
    """The value of an expression.

    Args:
        expr: a mask, a score, or an index expression.
        env: a value for each name the expression reads; tensors, which broadcast.
        tensors: what each lookup reads; its indices are clamped to its dimensions.
        real: the format of f32 arithmetic, torch.float32 by default; a reference asks for torch.float64.

    Returns:
        A bool, int64 or `real` tensor of the broadcast shape; a bool or an int where no tensor is read, as in `full`.

    Raises:
        InternalError: a name or a lookup has no value.
    """
    value: Value = _Evaluation(env, tensors or {}, real)(expr)
    return value


class _Evaluation:
    """Values of nodes, each computed once."""

    def __init__(
        self, env: Mapping[str, Any], tensors: Mapping[str, "torch.Tensor"], real: "torch.dtype | None"
    ) -> None:
        import torch

        self._torch = torch
        self._env = env
        self._tensors = tensors
        self._real = real or torch.float32

    def __call__(self, expr: Expr) -> Any:
        values: list[Any] = []
        for compute, each, places in _in_order(expr):
            values.append(compute(self, each, *[values[place] for place in places]))
        return values[-1]

    def _const(self, expr: Expr) -> Any:
        return self._to_real(expr.value) if expr.type == "f32" else expr.value

    def _name(self, expr: Expr) -> Any:
        if expr.name not in self._env:
            raise InternalError(f"{expr.name} was given no value")
        value = self._env[expr.name]
        if expr.type == "f32":
            return self._to_real(value)
        if isinstance(value, self._torch.Tensor):
            return value if expr.type == "bool" else value.to(self._torch.int64)
        return bool(value) if expr.type == "bool" else int(value)  # of numpy too

    def _lookup(self, expr: Expr, *indices: Any) -> Any:
        if expr.name in (SOME_KEPT, ALL_KEPT):
            return self._kept(expr, *indices)
        tensor = self._tensors.get(expr.name)
        if tensor is None:
            raise InternalError(f"{expr.name} was given no value")
        places = self._torch.broadcast_tensors(  # type: ignore[no-untyped-call]
            *(self._torch.as_tensor(index, device=tensor.device) for index in indices)
        )
        if tensor.numel():
            inside = zip(places, tensor.shape, strict=True)
            element = tensor[tuple(index.clamp(0, size - 1) for index, size in inside)]
        else:  # of a call without keys or rows, where no pair is there to see it
            element = tensor.new_zeros(places[0].shape)
        format = {"f32": self._real, "i32": self._torch.int64, "bool": self._torch.bool}[expr.type]
        return element.to(format)

    def _kept(self, expr: Expr, batch: Any, head: Any, *ends: Any) -> Any:
        """Whether some, or all blocks of a map are kept that lie between first and last rows and columns."""
        m, m_last, n, n_last = (self._torch.as_tensor(end) for end in ends)
        rows, columns = (
            range(1 + int((last - first).max()) if (last - first).numel() else 0)
            for first, last in ((m, m_last), (n, n_last))
        )
        one = lookup(GIVEN_BLOCKS.name, expr.args[:4], expr.type)
        join, found = (or_, False) if expr.name == SOME_KEPT else (and_, True)
        for i in rows:
            for j in columns:
                place = (batch, head, (m + i).minimum(m_last), (n + j).minimum(n_last))
                found = join(found, self._lookup(one, *place))
        return found

    def _arith(self, expr: Expr, a: Any, b: Any) -> Any:
        return _ARITHMETIC[expr.name](a, b)

    def _where(self, expr: Expr, condition: Any, yes: Any, no: Any) -> Any:
        if isinstance(condition, bool):
            return yes if condition else no
        yes, no = (self._torch.as_tensor(value, device=condition.device) for value in (yes, no))
        return self._torch.where(condition, yes, no)

    def _compare(self, expr: Expr, a: Any, b: Any) -> Any:
        return _COMPARISONS[expr.name](a, b)

    def _apply(self, expr: Expr, *args: Any) -> Any:
        """What needs nothing but its arguments."""
        return _OPERATIONS[expr.op](*args)

    def _call(self, expr: Expr, *args: Any) -> Any:
        torch = self._torch
        if expr.name == "f32":
            return self._to_real(args[0])
        if expr.name == "i32":
            lowest, highest = -(2.0**31), 2.0**31 - 1
            whole = torch.nan_to_num(args[0].to(torch.float64), 0.0, highest, lowest)
            return whole.clamp(lowest, highest).trunc().to(torch.int64)
        if expr.name in _OF_INTEGERS and all(isinstance(arg, int) for arg in args):
            return _OF_INTEGERS[expr.name](*args)
        numbers = [torch.as_tensor(arg) for arg in args]
        if expr.name == "sign":
            return (numbers[0] > 0).to(numbers[0].dtype) - (numbers[0] < 0).to(numbers[0].dtype)
        if expr.name == "sqrt":  # of f32 torch's own is a unit in the last place off now and then
            return torch.sqrt(numbers[0].to(torch.float64)).to(self._real)
        function = _FUNCTIONS.get(expr.name, expr.name)
        return getattr(torch, function)(*numbers)

    def _to_real(self, value: Any) -> Any:
        if isinstance(value, float):  # it stands for an f32, whatever torch's default is
            value = self._torch.tensor(value, dtype=self._torch.float32)
        return self._torch.as_tensor(value).to(self._real)


@lru_cache(maxsize=256)  # a simulated kernel asks for the same ones at every tile
def _in_order(expr: Expr) -> tuple[tuple[Callable[..., Any], Expr, tuple[int, ...]], ...]:
    """Every node, arguments first: the method that computes it, and the numbers of the nodes it takes."""
    order = {each: place for place, each in enumerate(nodes(expr))}
    methods = (getattr(_Evaluation, f"_{each.op}", _Evaluation._apply) for each in order)
    taken = (tuple(order[arg] for arg in each.args) for each in order)
    return tuple(zip(methods, order, taken, strict=True))


_OF_INTEGERS: dict[str, Callable[..., int]] = {"min": min, "max": max, "abs": abs}

_FUNCTIONS = {"min": "fmin", "max": "fmax"}
"""torch's names for functions that the language calls otherwise."""

_OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": lambda *terms: sum(terms[1:], start=terms[0]),
    "mul": lambda factor, atom: factor * atom,
    "le": lambda form: form <= 0,
    "eq": lambda form: form == 0,
    "ne": lambda form: form != 0,
    "and": lambda *conditions: reduce(and_, conditions),
    "or": lambda *conditions: reduce(or_, conditions),
    "not": lambda condition: condition ^ True,
}

_ARITHMETIC = {"+": add, "-": sub, "*": mul, "/": truediv, "//": floordiv, "%": mod}
_COMPARISONS = {"<": lt, "<=": le, "==": eq, "!=": ne}
