"""Tensors in a Python function: those that are declared, and those that the function holds.

A function of FlexAttention finds its tensors in its closure, in a global, in an attribute. The first time one is looked
into it is declared, by a name made of the variable's, and bound: who runs the expression passes it.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Never

from attngen.errors import shown
from attngen.expr.declarations import VALUE_TYPES, TensorType
from attngen.expr.literals import nearest_declarations
from attngen.expr.scope import example
from attngen.expr.traced import Traced, literal, operand, refuse

if TYPE_CHECKING:
    import torch

_FORMATS = {
    "bool": "bool", "uint8": "u8", "int32": "i32", "float16": "f16", "bfloat16": "bf16", "float32": "f32",
}  # fmt: skip
"""The language's formats by the names of torch's."""
_CONVERTED = {**dict.fromkeys(("int8", "int16", "int64", "uint16", "uint32"), "i32"), "float64": "f32"}
"""Formats that become one of the language's where all values fit."""
_MAX_NAME = 40  # characters of a variable's name


class TracedTensor:
    """A tensor in a Python function, or what is left of it once some of its indices are given.

    Attributes:
        text: the name of the tensor.
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(
        self, tensor: TensorType, shape: Sequence[int | str] = (), indices: tuple[Traced, ...] = ()
    ) -> None:
        self.text = tensor.name
        self._tensor = tensor
        self._shape = tuple(shape) or tensor.dims
        self._indices = indices

    def __repr__(self) -> str:
        return f"<traced tensor {self.text}>"

    @property
    def is_whole(self) -> bool:
        """Whether no index has been given yet."""
        return not self._indices

    @property
    def dtype(self) -> "torch.dtype":
        """The format that is declared, as torch calls it."""
        names = {format: name for name, format in _FORMATS.items()}
        dtype: torch.dtype = getattr(sys.modules["torch"], names[self._tensor.dtype])
        return dtype

    def __getitem__(self, indices: object) -> "Traced | TracedTensor":
        listed = indices if isinstance(indices, tuple) else (indices,)
        given = self._indices + tuple(
            self._index(index, place) for place, index in enumerate(listed, len(self._indices))
        )
        if len(given) < len(self._shape):
            return TracedTensor(self._tensor, self._shape, given)
        return Traced(
            f"{self.text}[{', '.join(index.text for index in given)}]", VALUE_TYPES[self._tensor.dtype]
        )

    def _index(self, index: object, place: int) -> Traced:
        """An index, from the start: Python counts negative ones from the end."""
        if index is None or index is Ellipsis or isinstance(index, slice | list):
            note = "each dimension takes one index; cut and reshape the tensor before the function"
            what = "..." if index is Ellipsis else shown(index)
            refuse(f"the tensor `{self.text}` is indexed by {what}", "traced-operands", what, note)
        traced = operand(index)
        constant = literal(traced)
        size = self._shape[place] if place < len(self._shape) else ""
        if constant is None or (not isinstance(size, int) and constant >= 0):
            return traced
        if isinstance(size, int) and -size <= constant < size:
            return operand(constant % size)
        note = f"the tensor is {self._tensor}"
        if isinstance(size, int):
            note = f"that dimension has {size}"
        elif constant < 0:
            note = "an index is clamped; Python would count from an end that is not known here"
        refuse(f"the tensor `{self.text}` is indexed by {constant}", "traced-operands", str(constant), note)

    def refuse_use(self, *others: object, **named: object) -> Never:
        """Refuse whatever needs one number, where this is a tensor or a part of one."""
        given, rank = len(self._indices), len(self._shape)
        what = (
            f"has {rank} dimensions and is given {given} of as many indices"
            if given
            else "is used without an index"
        )
        note = f"write {example(self.text, self._tensor)}"
        refuse(f"the tensor `{self.text}` {what}", "traced-operands", self.text, note)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = refuse_use
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __and__ = __rand__ = __or__ = __ror__ = refuse_use
    __xor__ = __rxor__ = __lt__ = __le__ = __gt__ = __ge__ = __neg__ = __invert__ = __abs__ = refuse_use
    __eq__ = __ne__ = refuse_use
    __bool__ = __len__ = __float__ = __int__ = __index__ = __setitem__ = refuse_use

    def __iter__(self) -> Never:
        refuse(f"the tensor `{self.text}` is known to the kernel only", "traced-value", self.text)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return Traced.__torch_function__(function, types, args, kwargs)


class Captured:
    """The tensors that one function holds, as far as it has looked into them.

    Attributes:
        declared: their formats and dimensions by name; each dimension has a name of its own, so that one kernel serves
            all sizes.
        bound: the tensors by name.
    """

    def __init__(self, prefix: str, taken: Sequence[str]) -> None:
        self.declared: dict[str, str] = {}
        self.bound: dict[str, torch.Tensor] = {}
        self._prefix = prefix
        self._taken = set(taken)
        self._known: dict[tuple[object, ...], TracedTensor] = {}
        self._originals: list[torch.Tensor] = []  # kept, so that no other tensor takes their memory

    def of(self, tensor: "torch.Tensor") -> TracedTensor:
        """The traced tensor for a tensor of torch; views of one memory are one tensor."""
        word = _variable_of(tensor)
        if tensor.is_nested or tensor.layout != sys.modules["torch"].strided:
            refuse(f"the tensor `{word}` is not dense", "traced-tensors", word, "one that is can be declared")
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if key not in self._known:
            name = self._free(f"{self._prefix}_{_as_name(word)}")
            format, kept = _in_format(tensor, word)
            dims = tuple(self._free(f"{name}_size{place}") for place in range(tensor.dim()))
            declared = TensorType(name, format, dims)
            self._known[key] = TracedTensor(declared, tensor.shape)
            self._originals.append(tensor)
            self.declared[name], self.bound[name] = str(declared), kept
        return self._known[key]

    def _free(self, wanted: str) -> str:
        """The wanted name, or the first with a number behind it that nothing has."""
        name, number = wanted, 2
        while name in self._taken:
            name, number = f"{wanted}_{number}", number + 1
        self._taken.add(name)
        return name


_captured: ContextVar[Captured | None] = ContextVar("captured", default=None)


@contextmanager
def capturing(prefix: str, taken: Sequence[str]) -> Iterator[Captured]:
    """Have tensors captured in this context, under names that start with `prefix` and are not `taken`."""
    token = _captured.set(Captured(prefix, taken))
    try:
        yield _captured.get()  # type: ignore[misc]
    finally:
        _captured.reset(token)


def traced_tensor(value: Any) -> Any:
    """What a function holds: of a tensor with dimensions the traced one, of anything else itself."""
    captured = _captured.get()
    return captured.of(value) if captured and _is_tensor(value) and value.dim() else value


def constant_of(value: Any) -> Any:
    """The number that a value of numpy or a tensor without dimensions holds; anything else as it is.

    Raises:
        ExpressionError: a tensor with dimensions, which can only be looked into.
    """
    if isinstance(value, Traced | TracedTensor):
        return value
    if not _is_tensor(value):
        # numpy's truth values and arrays without dimensions are no numbers of Python.
        return value.item() if getattr(value, "shape", None) == () and hasattr(value, "dtype") else value
    if not value.dim():
        if value.requires_grad and sys.modules["torch"].is_grad_enabled():
            note = "there is no backward yet: write .detach()"
            refuse("a tensor that requires grad is taken for a number", "traced-tensors", shown(value), note)
        return value.item()
    word = _variable_of(value)
    message = f"{_described(value, word)} is used without an index"
    refuse(message, "traced-operands", word, f"write {word}[...], with an index for each dimension")


def _is_tensor(value: object) -> bool:
    return isinstance(value, sys.modules["torch"].Tensor) if "torch" in sys.modules else False


def _in_format(tensor: "torch.Tensor", word: str) -> tuple[str, "torch.Tensor"]:
    """The language's format for a tensor, and the tensor in it: itself, or a copy that has the same values."""
    import torch

    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype in _FORMATS:
        return _FORMATS[dtype], tensor
    shown = _described(tensor, word)
    if dtype not in _CONVERTED:
        note = f"it may be one of {', '.join((*_FORMATS, *_CONVERTED))}"
        refuse(f"{shown} has no format of the language", "traced-tensors", word, note)
    if _CONVERTED[dtype] == "i32":
        wide = tensor.to(torch.int64)  # torch finds no minimum of uint16
        if wide.numel() and not -(2**31) <= int(wide.min()) <= int(wide.max()) < 2**31:
            note = "an integer of the language is looked up from 32 bits"
            refuse(f"{shown} holds integers beyond 2^31", "traced-tensors", word, note)
        return "i32", tensor.to(torch.int32)
    if tensor.requires_grad:
        note = f"write {word}.float(), whose gradient reaches {word}, or {word}.detach()"
        refuse(f"{shown} requires grad, and a copy of it in f32 would take it", "traced-tensors", word, note)
    rounded = tensor.to(torch.float32)
    if not bool(((rounded.to(tensor.dtype) == tensor) | tensor.isnan()).all()):
        refuse(f"{shown} holds numbers that f32 rounds", "traced-tensors", word, f"write {word}.float()")
    return "f32", rounded


def declaration_of(value: Any) -> str:
    """The text that declares what is like a value: of a tensor or an array with its sizes, of a number by its type."""
    if isinstance(value, list | tuple) or getattr(value, "is_nested", False) is True:
        return "f32[batch]"
    shape = getattr(value, "shape", None)
    if not isinstance(shape, tuple) or not shape:
        return nearest_declarations(str(constant_of(value)).lower())[0]
    dtype = str(getattr(value, "dtype", "")).removeprefix("torch.")
    return f"{_FORMATS.get(dtype) or _CONVERTED.get(dtype, 'f32')}[{', '.join(map(str, shape))}]"


def _described(tensor: "torch.Tensor", word: str) -> str:
    """A tensor as the subject of a sentence."""
    subject = f"the tensor `{word}`" if word != _UNNAMED else "a tensor"
    return f"{subject}, {tensor.dtype} of shape {tuple(tensor.shape)},"


_UNNAMED = "tensor"


def _variable_of(tensor: "torch.Tensor") -> str:
    """The name by which the function that is being read has a tensor, found in the frames of the call."""
    frame = sys._getframe(1)
    while frame:
        module = str(frame.f_globals.get("__name__"))
        if module == "attngen.expr.python":
            break
        if not module.startswith(("attngen.expr.", "torch.")):
            names = frame.f_code.co_names
            known = {**{word: frame.f_globals.get(word) for word in names}, **frame.f_locals}
            for word, value in known.items():
                if value is tensor:
                    return word
            for word, value in known.items():
                for part, held in _held(value, names):
                    if held is tensor:
                        return f"{word}_{part}" if isinstance(value, list | tuple | dict) else part
        frame = frame.f_back  # type: ignore[assignment]
    return _UNNAMED


def _held(value: object, names: Sequence[str]) -> Iterable[tuple[str, object]]:
    """What a list, a tuple or a dict holds, and what an object has among attributes of these names."""
    if isinstance(value, list | tuple):
        return ((str(place), held) for place, held in enumerate(value))
    if isinstance(value, dict):
        return ((str(key), held) for key, held in value.items())
    held = getattr(value, "__dict__", {})
    if isinstance(held, dict):  # a module of torch has its parameters and buffers apart
        held = {**held, **held.get("_parameters", {}), **held.get("_buffers", {})}
        return ((name, held[name]) for name in names if name in held)
    return ()


def _as_name(word: str) -> str:
    """A variable's name in the letters of the language."""
    return re.sub(r"[^A-Za-z0-9_]+", "_", word)[:_MAX_NAME].strip("_") or _UNNAMED
