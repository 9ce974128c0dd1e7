"""Stand-ins for frameworks that are not installed: as much of their classes as attngen's modules build on.

Names, arguments, their order and defaults are those of TorchTitan at commit b5bcd76, in
torchtitan/models/common/attention.py; the bodies are not. Programs find them under the framework's own name while
`standing_in` lasts.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from importlib import import_module
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn


class Module(nn.Module):
    """TorchTitan's: made by its config, which knows whose it is."""

    @dataclass(kw_only=True, slots=True)
    class Config:
        """What a module is made by."""

        _owner: ClassVar[type | None] = None
        param_init: dict | None = None
        sharding_config: Any = None

        def build(self) -> Any:
            assert self._owner is not None
            return self._owner(config=replace(self))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "Config" in cls.__dict__:
            assert "__slots__" in cls.Config.__dict__ and all(each.kw_only for each in fields(cls.Config))
            cls.Config._owner = cls


class VarlenMetadata(NamedTuple):
    cu_seq_q: Tensor
    cu_seq_k: Tensor
    max_q: int
    max_k: int
    cu_seq_q_host: tuple[int, ...] | None = None


class VarlenAttention(Module):
    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """Keys before and behind a query."""

        window_size: tuple[int, int] = (-1, 0)

    def __init__(self, config: Config) -> None:
        raise AssertionError("it would activate a flash attention for the whole process")

    def forward(
        self,
        q_TNH: Tensor,
        k_TNH: Tensor,
        v_TNH: Tensor,
        *,
        attention_masks: VarlenMetadata,
        scale: float | None = None,
        out_transform: Callable[[Tensor, Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        raise AssertionError("attention that attngen should have computed")


_MODULES: dict[str, dict[str, Any]] = {
    "torchtitan.models.common.attention": {
        "VarlenAttention": VarlenAttention,
        "VarlenMetadata": VarlenMetadata,
    },
}


@contextmanager
def standing_in(face: str) -> Iterator[ModuleType]:
    """A face of attngen over these classes, whatever is installed; afterwards all is as it was."""
    roots = {name.partition(".")[0] for name in _MODULES}

    def taken() -> dict[str, ModuleType]:
        return {name: x for name, x in sys.modules.items() if name == face or name.partition(".")[0] in roots}

    before = taken()
    for name in before:
        del sys.modules[name]
    for name, members in _MODULES.items():
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            package = ".".join(parts[:depth])
            sys.modules.setdefault(package, ModuleType(package))
        vars(sys.modules[name]).update(members)
    try:
        yield import_module(face)
    finally:
        for name in taken():
            del sys.modules[name]
        sys.modules.update(before)
