"""What tests ask of a call alone: its attention kernel, or its launches without code."""

from attngen.arch import Arch
from attngen.lower import lower
from attngen.plan import KernelPlan
from attngen.spec import Spec


def kernel_plan(spec: Spec, arch: Arch) -> KernelPlan:
    """The kernel that takes calls of any length.

    Raises:
        PlanError: the spec has none.
    """
    return lower(spec, arch).attention


def no_code(module: str) -> bytes:
    """Stands for the machine code of a module where a recorder stands for the driver."""
    return b""
