"""What a tree weighs: about how many machine instructions one reading of its CUDA text takes.

NVRTC's time goes by it: some 0.12 ms a unit on one core of 2024, where the text stands once.
"""

from attngen.expr.tree import Expr, nodes

LARGEST_INLINE = 128
"""What weighs more is called and not copied: a kernel asks for some hundred pairs."""

LARGEST_KERNEL = 20_000
"""Most that all functions of a kernel may weigh together, so that NVRTC takes no more than some seconds."""

WEIGHT_OF_TABLE = 450
"""What one table of extremes adds to the kernel that fills all of them."""

_EXACT_CALLS = {
    "sin": 150,
    "cos": 150,
    "tanh": 20,
    "exp": 10,
    "log": 20,
    "log2": 20,
    "sigmoid": 20,
    "sqrt": 10,
}
"""Functions of f32 as the language defines them: of sin and cos it is the reduction of large arguments."""


def weight(*exprs: Expr) -> int:
    """The sum over all nodes, each counted once, as the text has it."""
    return sum(map(_weight, nodes(*exprs)))


def _weight(expr: Expr) -> int:
    if expr.op in ("const", "name", "mul"):
        return 0
    if expr.op == "lookup":
        return 5 * len(expr.args)
    if expr.op == "call":
        return _EXACT_CALLS.get(expr.name, 2)
    if expr.op == "arith" and expr.name in ("//", "%"):
        return 5 if expr.args[1].op == "const" else 30
    if expr.op == "arith" and expr.name == "/":
        return 10
    return max(1, len(expr.args) - 1)
