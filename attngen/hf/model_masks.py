"""The masks that models pass to their layers: texts of the language, and the values that these read.

transformers calls `make_mask` once a forward pass for each kind of layer, and hands what it returns to the attention of
all layers of that kind, untouched.
"""

import traceback
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedConfig
from transformers.masking_utils import prepare_padding_mask

from attngen.bind import TileTables
from attngen.errors import ArgumentError, AttngenError, ModelError, shown
from attngen.hf.documents import within_documents
from attngen.hf.mask_functions import MaskFunction, read_mask
from attngen.kernel import Kernel

_ONLY_TENSORS = {
    "doge": "its layers pass over a mask that is no tensor, and with it over causality; use sdpa",
}
"""Types of models that lose a mask which is an object, and how."""
_NOT_OF_MASKS = (Path(__file__).parents[1], Path(torch.__file__).parent)


class ModelMask(BlockMask):
    """Which keys queries see, in all layers of a kind.

    It is a `BlockMask`, of which it has the four dimensions and nothing else, so that transformers takes it for a mask
    that has been made already.

    Attributes:
        text: an expression of the language.
        tensors: what it declares, by name.
        values: what it reads, by name.
        kept: kernels, and their tables of this mask, by what they depend on besides.
    """

    ndim = 4

    def __init__(
        self,
        function: MaskFunction,
        shape: tuple[int, int, int, int],
        padding: torch.Tensor | None = None,
        q_offset: int | torch.Tensor = 0,
        kv_offset: int = 0,
        device: torch.device | str = "cpu",
        looks_nothing_up: bool = False,
    ) -> None:
        if isinstance(q_offset, torch.Tensor):
            # A cache counts on in its own tensor, before the first layer reads it.
            q_offset = q_offset.clone().reshape(())
        self._places = (q_offset, kv_offset, device, looks_nothing_up)
        self._function = function
        self._shape = shape
        self._padding = padding
        self._packed: tuple[torch.Tensor, torch.Tensor, ModelMask] | None = None
        self.text, self.tensors, self.values = read_mask(function, shape, padding, *self._places)
        self.kept: dict[Any, tuple[Kernel, TileTables | None]] = {}

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Batch, 1, rows of q, rows of k."""
        return self._shape

    def __repr__(self) -> str:
        return f"<attngen mask {list(self._shape)}: {self.text}>"

    __str__ = __repr__

    def __getitem__(self, index: Any) -> "ModelMask":
        """The mask of the first keys, `mask[:, :, :, :n]`; there is none of other parts.

        Raises:
            ArgumentError: the index is of others.
        """
        parts = index if isinstance(index, tuple) else (index,)
        *others, keys = (*parts, *[slice(None)] * 3)[:4]
        is_sliced = all(isinstance(part, slice) for part in parts)
        if not is_sliced or others != [slice(None)] * 3 or keys.indices(self._shape[-1])[::2] != (0, 1):
            must = "[:, :, :, :n]: a mask of attngen is a text, and of its first keys alone is there another"
            raise ArgumentError("mask", f"the index {shown(index)}", must)
        return self.of_keys(keys.indices(self._shape[-1])[1])

    def of_keys(self, count: int) -> "ModelMask":
        """The mask of the first keys."""
        if count == self._shape[-1]:
            return self
        padding = None if self._padding is None else self._padding[:, :count]
        return ModelMask(self._function, (*self._shape[:3], count), padding, *self._places)

    def of_documents(self, starts_q: torch.Tensor | None, starts_k: torch.Tensor | None) -> "ModelMask":
        """The mask of a row of documents, by their cumulative lengths; made once for all layers.

        Raises:
            ArgumentError: there are other rows, or tokens before this one in a cache.
        """
        if starts_q is None or starts_k is None:
            name = "cu_seq_lens_q" if starts_q is None else "cu_seq_lens_k"
            raise ArgumentError(name, "None", "a tensor, as the other one is")
        if self._shape[0] != 1:
            raise ArgumentError(
                "cu_seq_lens_q", f"documents in a batch of {self._shape[0]}", "one row of all documents"
            )
        if self._places[:2] != (0, 0):
            raise ArgumentError(
                "cu_seq_lens_q", "documents behind tokens of a cache", "an empty cache, or none"
            )
        if self._packed is None or self._packed[0] is not starts_q or self._packed[1] is not starts_k:
            function = within_documents(self._function, starts_q, starts_k, *self._shape[2:])
            self._packed = (starts_q, starts_k, ModelMask(function, self._shape, self._padding))
        return self._packed[2]

    def to(self, device: torch.device | str, **how: Any) -> "ModelMask":
        """The mask with its tensors on another device, as a model wants it whose layers are on several."""
        moved = copy(self)
        moved.values = {
            name: x.to(device, **how) if isinstance(x, torch.Tensor) else x for name, x in self.values.items()
        }
        moved.kept = {}
        return moved


def make_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: MaskFunction,
    config: PreTrainedConfig,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **hints: Any,
) -> ModelMask:
    """The mask of the layers of a kind in one forward pass, for transformers.

    Args:
        batch_size: rows of the batch.
        q_length: rows of q.
        kv_length: rows of k.
        mask_function: of (batch_idx, head_idx, q_idx, kv_idx).
        config: of the model, for its name in errors.
        q_offset: the q_idx of the first row of q; a tensor on the device where a static cache counts it there.
        kv_offset: the kv_idx of the first row of k.
        attention_mask: (batch, keys) bool: which keys are no padding; keys behind it are.
        device: of the model's layers.
        **hints: what other implementations want to know, such as when a mask may be left out.

    Raises:
        ModelError: the function does what the language cannot say.
    """
    model = config.model_type
    if model in _ONLY_TENSORS:
        raise ModelError(model, "mask", _ONLY_TENSORS[model])
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + kv_length]
    try:
        shape = (batch_size, 1, q_length, kv_length)
        # So transformers says that it is causal, with a window at most; or with chunks, whose function holds a tensor.
        is_plain = hints.get("allow_is_causal_skip", False) and not getattr(config, "attention_chunk_size", 0)
        return ModelMask(mask_function, shape, padding, q_offset, kv_offset, device, is_plain)
    except AttngenError as error:
        raise ModelError(model, "mask", f"{_line_of(error)}{error}") from error


def _line_of(error: AttngenError) -> str:
    """Where a mask function does what no text says: the innermost line that is neither attngen's nor torch's."""
    for frame in reversed(traceback.extract_tb((error.__cause__ or error).__traceback__)):
        if not any(Path(frame.filename).is_relative_to(folder) for folder in _NOT_OF_MASKS):
            return f"{frame.filename}:{frame.lineno}, `{frame.line}`: "
    return ""
