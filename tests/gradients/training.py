"""The training example as a module, and what its curves are held to: on the simulator, and on a GPU."""

import importlib.util
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType

import attngen

EXAMPLE = Path(attngen.__file__).parents[1] / "examples" / "train_tiny.py"
TIMES = 3
"""How many times as far from f32 as torch's own bf16 a curve may lie: of sixteen seeds on a CPU one did by 2.2."""


@cache
def train_tiny() -> ModuleType:
    """`examples/train_tiny.py`, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("train_tiny", EXAMPLE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_tiny"] = module
    spec.loader.exec_module(module)
    return module


def is_near(losses: list[float], curves: Mapping[str, list[float]]) -> bool:
    """Whether a curve lies as near to torch's in f32 as torch's in bf16 does, `TIMES` over, and is not that of f32."""
    distance, exact = train_tiny().distance, curves["torch f32"]
    return 0 < distance(losses, exact) <= TIMES * distance(curves["torch bf16"], exact)


def falls_to(losses: list[float], share: float) -> bool:
    """Whether the last steps cost at most a share of the first, which knows nothing: ln of 103 characters, or more."""
    last: float = train_tiny().smooth(losses)[-1].item()
    return last <= share * losses[0]
