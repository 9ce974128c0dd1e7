"""CUDA files that ask what a kernel's expressions come to: their values element by element, and classes of tiles.

They hold the very functions that a kernel of the plan would, so that what is said of them is said of the kernel.
Nothing here computes attention.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attngen.emit.device import used_by
from attngen.emit.environment import Templates, environment
from attngen.emit.kernel_text import table_kernel
from attngen.emit.lookups import leaves
from attngen.emit.pair_functions import pair_functions
from attngen.expr import Expr, cuda_body
from attngen.plan import KernelPlan

_MACROS = Path(__file__).with_name("probes.cu.j2")
PROBE_THREADS = 128
"""Threads of a block of every probe."""


def elementwise_source(plan: KernelPlan, kernels: Mapping[str, Sequence[Expr]], exact: bool = True) -> str:
    """A kernel each for some expressions, whose results it writes one after the other.

    Args:
        plan: of a kernel that reads every scalar and tensor that the expressions read.
        kernels: the expressions, by the kernel's name.
        exact: f32 arithmetic as in a mask, rather than as in a score.
    """
    macros = _macros(plan)
    known = leaves(plan, exact)
    texts = [_functions(plan), macros.samples()]
    first = 0
    for name, exprs in kernels.items():
        texts.append(macros.expression(name, PROBE_THREADS, first, cuda_body(exprs, known)))
        first += len(exprs)
    return _with_library([str(text) for text in texts])


def classes_source(plans: Mapping[str, KernelPlan]) -> str:
    """A kernel each that classes all tiles of a call, by its name, with the kernels that fill the plans' tables."""
    texts = []
    for name, plan in plans.items():
        probe = _macros(plan).classes(name, PROBE_THREADS, plan.key_blocks is not None)
        texts.append(f"namespace of_{name} {{\n{_functions(plan)}\n{probe}}}\n")
    return _with_library(texts)


def _macros(plan: KernelPlan) -> Any:
    return environment().from_string(_MACROS.read_text(encoding="utf-8")).make_module(Templates(plan).context)


def _functions(plan: KernelPlan) -> str:
    """The constants, the parameters and the functions of a plan."""
    constants = (("kBlockM", plan.block_m), ("kBlockN", plan.block_n))
    return str(_macros(plan).functions(plan, constants, pair_functions(plan), table_kernel(plan)))


def _with_library(texts: Sequence[str]) -> str:
    text = "\n".join(texts)
    return "\n\n".join([*used_by(text), text])
