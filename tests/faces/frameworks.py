"""Stand-ins for frameworks that are not installed: as much of their classes as attngen's modules build on.

Names, arguments, their order and defaults are those of TorchTitan at commit b5bcd76, in
torchtitan/models/common/attention.py, and of Megatron-LM core_v0.19.0, in megatron/core/packed_seq_params.py and
megatron/core/transformer (dot_product_attention.py, enums.py, transformer_config.py); the bodies are not. Programs find
them under the frameworks' own names while `standing_in` lasts.
"""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from enum import Enum
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

PAGE = Path(__file__).parents[2] / "docs/integration.md"


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


class AttnMaskType(Enum):
    padding = 1
    causal = 2
    no_mask = 3
    padding_causal = 4
    arbitrary = 5
    causal_bottom_right = 6


@dataclass
class PackedSeqParams:
    qkv_format: str | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_kv: Tensor | None = None
    cu_seqlens_q_padded: Tensor | None = None
    cu_seqlens_kv_padded: Tensor | None = None
    max_seqlen_q: int | None = None
    max_seqlen_kv: int | None = None
    local_cp_size: int | None = None
    cp_group: Any = None
    total_tokens: int | None = None
    seq_idx: Tensor | None = None
    tokens_per_sample: int | None = None
    pad_between_seqs: bool | None = None


@dataclass
class TransformerConfig:
    """What of Megatron's config core attention asks for; not all defaults are Megatron's."""

    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    attention_dropout: float = 0.1
    window_size: tuple[int, int] | None = None
    window_attn_skip_freq: int | None = None
    softmax_type: str = "vanilla"
    apply_query_key_layer_scaling: bool = False
    context_parallel_size: int = 1
    qk_clip: bool = False
    log_max_attention_logit: bool = False


class DotProductAttention(nn.Module):
    """Megatron's: what it makes of a config is here, on the CPU."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        self.config, self.attn_mask_type = config, attn_mask_type
        every = config.window_attn_skip_freq
        has_window = config.window_size is not None and (every is None or layer_number % every != 0)
        divisor = layer_number if config.apply_query_key_layer_scaling else None
        self.softmax_scale = (config.kv_channels**-0.5 if softmax_scale is None else softmax_scale) / (
            divisor or 1
        )
        self.scale_mask_softmax = SimpleNamespace(
            scale=divisor, window_size=config.window_size if has_window else None
        )
        self.attention_dropout = nn.Dropout(
            config.attention_dropout if attention_dropout is None else attention_dropout
        )
        self.softmax_offset: Tensor | None = None
        if config.softmax_type != "vanilla":
            offset = torch.zeros(config.num_attention_heads)
            self.softmax_offset = nn.Parameter(offset) if config.softmax_type == "learnable" else offset

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        raise AssertionError("attention that attngen should have computed")


_MODULES: dict[str, dict[str, Any]] = {
    "torchtitan.models.common.attention": {
        "VarlenAttention": VarlenAttention,
        "VarlenMetadata": VarlenMetadata,
    },
    "megatron.core.transformer.dot_product_attention": {"DotProductAttention": DotProductAttention},
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


def assert_same_signatures(own: type, theirs: type) -> None:
    """Parameters, their order, kinds and defaults are those of the class in whose place it stands."""
    for name in ("__init__", "forward"):
        found, wanted = (
            [
                (each.name, each.kind, each.default)
                for each in signature(getattr(of, name)).parameters.values()
            ]
            for of in (own, theirs)
        )
        assert found == wanted


def lines_of_page(face: str) -> str:
    """The Python of docs/integration.md that names a face."""
    (lines,) = re.findall(
        rf"```python\n([^`]*{re.escape(face)}.*?)```", PAGE.read_text(encoding="utf-8"), re.S
    )
    return str(lines)
