"""Mask functions of transformers as texts of the language.

A mask function takes (batch_idx, head_idx, q_idx, kv_idx), places of tokens in their sequences, and is a tree of
closures over others, over numbers and over tensors. It is called once, on symbols, as `attngen.expression` calls any
function; what it holds is made ready for that in a copy. Nothing on a device is read by the host.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from types import CellType, FunctionType
from typing import Any, NamedTuple

import torch
from transformers import masking_utils

from attngen.expr import LARGEST_LENGTH, free_names, parse_mask, read_declarations, tensor_names, to_text
from attngen.expr.python import Expression, expression
from attngen.expr.traced import Traced, operand
from attngen.torch_state import constant

MaskFunction = Callable[..., Any]
NOTHING: Mapping[Any, Any] = {}

_MODULES = (masking_utils.__name__, "attngen.hf.documents")
"""Whose functions are known by their names."""
_READ = {"q_offset": "i32[1]", "kv_offset": "i32[1]", "padding": "bool[batch, seqlen_k]"}
"""What a mask reads besides the tensors of its function."""
_IN_FORMAT = (torch.bool, torch.uint8, torch.int32)
"""Whole numbers that the language has as they are."""
_KEYS, _QUERIES = ("batch", "seqlen_k"), ("batch", "seqlen_q")
_COUNTED_UP = {
    "packed_sequence_mask_function.<locals>.inner_mask": {"packed_sequence_mask": _KEYS},
    "within_documents.<locals>.inner_mask": dict(kv_documents=_KEYS, q_documents=_QUERIES, q_places=_QUERIES),
}
"""Functions that hold tensors whose numbers never fall along a row, by their variables, and their dimensions."""
_REMAPPED = "remap_positions_for_packed_sequence.<locals>.inner_mask"
"""It counts from the first token of a document, and stands beside what hides pairs of two documents: where distances
alone matter it need not count so."""


class MaskText(NamedTuple):
    """A mask as a text of the language.

    Attributes:
        text: the expression.
        tensors: what it declares.
        values: these tensors, by name.
    """

    text: str
    tensors: Mapping[str, str] = NOTHING
    values: Mapping[str, Any] = NOTHING


def read_mask(
    function: MaskFunction,
    shape: tuple[int, int, int, int],
    padding: torch.Tensor | None = None,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    device: torch.device | str = "cpu",
    looks_nothing_up: bool = False,
) -> MaskText:
    """The text of a mask function.

    Offsets are no part of it: where the last query stands beside the last key it says so (`q_pos`), and one kernel
    serves a prompt and every step after it; else they are read on the device. torch.compile looks into functions that
    look nothing up, as the two usual ones; at all others its graph ends and begins anew.

    Args:
        function: of transformers, or a user's. Of whole numbers of 64 bits in its tensors the last 32 are read.
        shape: batch, 1, rows of q, rows of k.
        padding: (batch, rows of k), bool: which keys are none.
        q_offset: what the function calls q_idx of the first row of q; not negative.
        kv_offset: what it calls kv_idx of the first row of k; not negative.
        device: of the call's tensors.
        looks_nothing_up: that the function is known to hold no tensor; it need not be said.

    Raises:
        ExpressionError: the function does what the language cannot say.
    """
    is_aligned = isinstance(q_offset, int) and q_offset + shape[2] == kv_offset + shape[3]
    first_kv = _on_device(kv_offset, device)
    first_q = None if is_aligned else _on_device(q_offset, device)
    is_full = function is masking_utils.bidirectional_mask_function
    is_usual = is_full or function is masking_utils.causal_mask_function
    if is_usual or (looks_nothing_up and torch.compiler.is_dynamo_compiling()):
        function = _every_pair if is_full else function
        return _mask_of_places(function, is_aligned, padding, first_q, first_kv)
    made: MaskText = _traced_mask(function, shape, is_aligned, padding, first_q, first_kv)
    return made


def _on_device(offset: int | torch.Tensor, device: torch.device | str) -> torch.Tensor | None:
    """An offset as kernels read it, i32[1]; None of 0."""
    if isinstance(offset, torch.Tensor):
        return offset.reshape(1).to(torch.int32)
    return torch.full((1,), offset, dtype=torch.int32, device=device) if offset else None


def _mask_of_places(
    function: MaskFunction,
    is_aligned: bool,
    padding: torch.Tensor | None,
    first_q: torch.Tensor | None,
    first_kv: torch.Tensor | None,
) -> MaskText:
    """The text of a function that looks nothing up, from a call with symbols, which torch.compile can look into."""
    values = {"q_offset": first_q, "kv_offset": first_kv, "padding": padding}
    values = {name: value for name, value in values.items() if value is not None}

    def place(index: str, offset: str) -> Traced:
        symbol = Traced(index, "i32")
        return (
            symbol + Traced(f"clamp({offset}[0], 0, {LARGEST_LENGTH})", "i32") if offset in values else symbol
        )

    q = place("q_pos", "kv_offset") if is_aligned else place("q_idx", "q_offset")
    seen = function(Traced("b", "i32"), Traced("h", "i32"), q, place("kv_idx", "kv_offset")).text
    text, names = _simplest(seen if padding is None else f"({seen}) and padding[b, kv_idx]")
    return MaskText(text, {name: _READ[name] for name in names}, {name: values[name] for name in names})


@constant
def _simplest(text: str) -> tuple[str, tuple[str, ...]]:
    """The simplest text of a mask, and the names of what it reads still; torch.compile takes both for constants."""
    return _simplest_of(text)


@lru_cache(maxsize=256)
def _simplest_of(text: str) -> tuple[str, tuple[str, ...]]:
    read = Expression(text)
    read.tensors = _READ
    simplest = _simplified(read)
    return str(simplest), tuple(simplest.tensors)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _traced_mask(
    function: MaskFunction,
    shape: tuple[int, int, int, int],
    is_aligned: bool,
    padding: torch.Tensor | None,
    first_q: torch.Tensor | None,
    first_kv: torch.Tensor | None,
) -> MaskText:
    """The text of any function, from a call with symbols."""
    batch, _, queries, keys = shape
    copies = _Copies({(batch,): ("batch",), (1,): ("1",), (batch, queries): _QUERIES, (batch, keys): _KEYS})

    def seen(b: Traced, h: Traced, q_idx: Traced, kv_idx: Traced, q_pos: Traced) -> Any:
        kv = _from(first_kv, kv_idx)
        q = _from(first_kv, q_pos) if is_aligned else _from(first_q, q_idx)
        shown = copies.of(function)(b, h, q, kv)
        return shown if padding is None else shown & padding[b, kv_idx]

    read = expression(seen)
    read.tensors = {name: copies.declaration(read.bound[name], text) for name, text in read.tensors.items()}
    text = _simplified(read)
    return MaskText(str(text), text.tensors, {name: read.bound[name] for name in text.tensors})


def _from(first: Any, index: Traced) -> Traced:
    """A place, counted from where its axis begins. Within the ends of an index, sums need no 64 bits."""
    return index if first is None else index + first[operand(0)].clamp(0, LARGEST_LENGTH)


def _simplified(read: Expression) -> Expression:
    """A mask as simple as the language has it, and what is left to declare: of `kv_idx + n <= q_idx + n` no n."""
    tree = parse_mask(read, read_declarations(read.scalars, read.tensors, {}).declarations)
    text = Expression(to_text(tree))
    text.scalars = {name: declared for name, declared in read.scalars.items() if name in free_names(tree)}
    text.tensors = {name: declared for name, declared in read.tensors.items() if name in tensor_names(tree)}
    return text


def _sees_distances_alone(function: MaskFunction) -> bool:
    """Whether a mask function gives the same for two tokens as for two others that are as far apart."""

    def seen(b: Traced, h: Traced, q_idx: Traced, kv_idx: Traced, n: Traced) -> Any:
        return _Copies().of(function)(b, h, q_idx + n, kv_idx + n)

    return not _simplified(expression(seen, scalars={"n": "i32"})).scalars


def _every_pair(b: Any, h: Any, q: Any, kv: Any) -> Traced:
    return operand(True)


def _window(sliding_window: int) -> MaskFunction:
    return lambda b, h, q, kv: (q - kv <= sliding_window) & (kv - q <= sliding_window)


def _chunk(chunk_size: int, left_padding: torch.Tensor) -> MaskFunction:
    def same_chunk(b: Any, h: Any, q: Any, kv: Any) -> Any:
        first = left_padding[b].clamp(0, LARGEST_LENGTH)
        return (q - first) // chunk_size == (kv - first) // chunk_size

    return same_chunk


_IN_OTHER_WORDS: dict[str, Callable[..., MaskFunction]] = {
    "bidirectional_mask_function": lambda: _every_pair,
    "sliding_window_bidirectional_overlay.<locals>.inner_mask": _window,
    "chunked_overlay.<locals>.inner_mask": _chunk,
}
"""What transformers says so that the language sees less of it: `q_idx >= 0`, which always holds, `abs(q_idx - kv_idx)`,
which is no interval of keys, and places less any whole number, which takes 64 bits.
"""


class _Copies:
    """Copies of functions and of what they hold, in formats that a kernel can read; each is made once.

    Args:
        dims: what the dimensions of tensors of some shapes are.
    """

    def __init__(self, dims: Mapping[tuple[int, ...], tuple[str, ...]] = NOTHING) -> None:
        self._dims = dims
        self._counted_up: dict[int, tuple[str, ...]] = {}
        self._made: dict[int, Any] = {}

    def declaration(self, x: torch.Tensor, as_read: str) -> str:
        """How a tensor is declared: with the sizes of the call, which kernels have at hand, where it has them."""
        dims = self._counted_up.get(id(x)) or self._dims.get(tuple(x.shape))
        order = " sorted" if id(x) in self._counted_up else ""
        return f"{as_read.partition('[')[0]}[{', '.join(dims)}]{order}" if dims else as_read

    def of(self, value: Any) -> Any:
        """The copy of a function, of a tensor, or of a list of such; anything else as it is."""
        if id(value) not in self._made:
            self._made[id(value)] = value  # which a function that holds itself meets again
            self._made[id(value)] = self._copy(value)
        return self._made[id(value)]

    def _copy(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._of_tensor(value)
        if type(value) in (list, tuple):
            return type(value)(map(self.of, value))
        return self._of_function(value) if isinstance(value, FunctionType) else value

    def _of_tensor(self, held: torch.Tensor) -> Any:
        if not (held.dtype in _IN_FORMAT or held.is_floating_point()):
            held = held.to(torch.int32)
        if held.dim():
            return held
        number = held.reshape(1)
        return number[operand(0)]

    def _of_function(self, function: FunctionType) -> MaskFunction:
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        held = {name: self.of(cell.cell_contents) for name, cell in cells.items() if cell != CellType()}
        name = function.__qualname__ if function.__module__ in _MODULES else ""
        if name in _IN_OTHER_WORDS:
            return _IN_OTHER_WORDS[name](**held)
        if name == _REMAPPED and _sees_distances_alone(cells["mask_function"].cell_contents):
            remapped: MaskFunction = held["mask_function"]
            return remapped
        self._counted_up |= {id(held[word]): dims for word, dims in _COUNTED_UP.get(name, {}).items()}
        closure = tuple(CellType(held[word]) if word in held else cell for word, cell in cells.items())
        copy = FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, closure
        )
        copy.__kwdefaults__ = function.__kwdefaults__
        return copy
