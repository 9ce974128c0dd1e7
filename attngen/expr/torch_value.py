"""Tree to value: what an expression is for given indices, integers or tensors. torch is imported late."""

from collections.abc import Mapping
from functools import reduce
from operator import and_, or_
from typing import TYPE_CHECKING, Any, Union

from attngen.errors import InternalError
from attngen.expr.tree import Expr

if TYPE_CHECKING:
    import torch

Value = Union[int, bool, "torch.Tensor"]


def evaluate(expr: Expr, env: Mapping[str, "int | torch.Tensor"]) -> Value:
    """The value of an expression.

    Args:
        expr: a mask, or an index expression.
        env: a value for each name the expression reads; tensors of any integer type, which broadcast.

    Returns:
        A bool or int64 tensor of the broadcast shape; a bool or an int where no tensor is read, as in `full`.

    Raises:
        InternalError: a name has no value.
    """
    exact = {key: _to_int64(value) for key, value in env.items()}
    value: Value = _value(expr, exact)
    return value


def _to_int64(value: "int | torch.Tensor") -> Any:
    if isinstance(value, int):
        return value
    import torch

    return value.to(torch.int64)


def _value(expr: Expr, env: Mapping[str, Any]) -> Any:
    if expr.op == "const":
        return expr.value
    if expr.op == "name":
        if expr.name not in env:
            raise InternalError(f"{expr.name} was given no value")
        return env[expr.name]
    values = [_value(arg, env) for arg in expr.args]
    if expr.op == "add":
        return sum(values[1:], start=values[0])
    if expr.op == "mul":
        return values[0] * values[1]
    if expr.op == "le":
        return values[0] <= 0
    if expr.op == "eq":
        return values[0] == 0
    if expr.op == "ne":
        return values[0] != 0
    return reduce(and_ if expr.op == "and" else or_, values)
