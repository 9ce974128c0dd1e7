"""A case of fuzzing: one spec, one problem, one property, as a value that a line of JSON can carry."""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch

from attngen.bind.numbers import LARGEST_SCALE
from attngen.check.caches import CACHE_TYPE, drawn_descales, has_cache
from attngen.check.cuts import Cut
from attngen.check.declared_inputs import declared_inputs
from attngen.check.inputs import (
    KINDS_WITH_SCALES,
    MEMORY_LAYOUTS,
    Kind,
    MemoryLayout,
    Shape,
    poison_unused,
    random_inputs,
    random_like,
)
from attngen.check.judging import call_dtype
from attngen.dtypes import dtype
from attngen.expr import LARGEST_LENGTH, SINK
from attngen.fuzz.block_maps import with_drawn_map
from attngen.fuzz.states import PLAIN, STATES
from attngen.plan import LETTERS
from attngen.spec import Spec, load
from attngen.torch_state import torch_defaults

Memory = MemoryLayout | Literal["far"]
"""How the storage of q, k and v is arranged; `far`: the last batch begins more than 2^31 elements after the first."""
MEMORIES: tuple[Memory, ...] = (*MEMORY_LAYOUTS, "far")
CallLayout = Literal["bshd", "bhsd"]
CALL_LAYOUTS: tuple[CallLayout, ...] = get_args(CallLayout)
FAR = 2**31
EXAMPLES = 200
"""Cases of a run that does not say how many."""

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def call_layouts(keys: str) -> tuple[CallLayout, ...]:
    """The layouts of calls whose keys are so; that of pages is said by the strides of what holds them."""
    return CALL_LAYOUTS[:1] if keys == "paged" else CALL_LAYOUTS


@dataclass(frozen=True)
class Case:
    """What is tried.

    Attributes:
        spec: of the kernel; its target says whose tiles and paddings it has, also where the simulator runs it.
        shape: batch, heads and lengths.
        softmax_scale: 1/sqrt(head_dim_qk) where None.
        memory: how q, k and v lie in memory.
        layout: in which order the call takes its dimensions.
        kind: what is drawn.
        seed: of the inputs.
        rule: name of the property that is checked beside the error bound; see `attngen.fuzz.properties`.
        state: of torch, in which inputs are drawn, calls are made and results are judged; see `attngen.fuzz.states`.
        has_dlse: whether lse has a gradient too, where the spec asks for gradients.
    """

    spec: Spec
    shape: Shape
    softmax_scale: float | None = None
    memory: Memory = "contiguous"
    layout: CallLayout = "bshd"
    kind: Kind = "randn"
    seed: int = 0
    rule: str = "error"
    state: str = PLAIN
    has_dlse: bool = False

    def to_json(self) -> str:
        """The case as one line."""
        data = {"spec": self.spec.to_dict(), "shape": asdict(self.shape)}
        rest = {key: value for key, value in vars(self).items() if key not in data and value is not None}
        return json.dumps(data | rest)

    @staticmethod
    def from_json(text: str) -> "Case":
        """Read what `to_json` wrote.

        Raises:
            ValueError: the text is not JSON, or its keys are not a case's.
            SpecError: the spec in it is not legal.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            case = Case(**data | {"spec": load(data["spec"]), "shape": _read_shape(data["shape"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a case of fuzzing: {error}") from None
        except RecursionError:
            raise ValueError("not a case of fuzzing: it is nested too deep") from None
        if (fault := case._fault()) is not None:
            raise ValueError(f"not a case of fuzzing: {fault}")
        return case

    def _fault(self) -> str | None:
        """What of a case that came from a text no case has."""
        shape, scale = self.shape, self.softmax_scale
        for value, known in (
            (self.memory, MEMORIES),
            (self.layout, call_layouts(self.spec.problem.keys)),
            (self.kind, KINDS_WITH_SCALES),
            (self.state, tuple(STATES)),
        ):
            if value not in known:
                return f"{value} is none of {', '.join(known)}"
        if self.memory == "far" and has_cache(self.spec):
            return "q, k and v are of two formats, and lie in no one memory"
        if not isinstance(self.rule, str):
            return "rule is no name"
        if type(self.has_dlse) is not bool:
            return "has_dlse is neither true nor false"
        if (fault := _fault_of_cuts(shape, self.spec)) is not None:
            return fault
        sizes = ("batch", "heads", "heads_kv", "seqlen_q", "seqlen_k")
        for name, size in ((name, getattr(shape, name)) for name in sizes):
            if type(size) is not int or not 0 <= size <= LARGEST_LENGTH:
                return f"{name} is no integer from 0 to {LARGEST_LENGTH}"
        if shape.heads % shape.heads_kv if shape.heads_kv else shape.heads:
            return f"heads_kv is {shape.heads_kv}, which does not divide {shape.heads} heads"
        if scale is not None and (type(scale) not in (int, float) or not abs(scale) <= LARGEST_SCALE):
            return f"softmax_scale is no number of at most {LARGEST_SCALE:.3g}"
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            return "seed is no integer from 0 to 2^63 - 1"
        return None

    def inputs(self, device: str) -> Tensors:
        """q, k and v, (batch, seqlen, heads, head_dim) each; bf16 where the kernel's inputs are e4m3."""
        drawn = self._drawn(self.spec.problem.head_dim.qk, device, self.seed)
        return far_apart(drawn) if self.memory == "far" else drawn

    def upstream(self, device: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The gradients of out, in the memory layout of q, and of lse, if it has one; poison where nothing counts."""
        dout = self._drawn(self.spec.problem.head_dim.v, device, self.seed + 1)[0]
        if not self.has_dlse:
            return dout, None
        of_rows = torch.empty(dout.shape[:-1], dtype=torch.float32, device=device)
        drawn = poison_unused(random_like(of_rows, self.seed + 2)[..., None], self.shape.queries)
        return dout, drawn[..., 0].transpose(-1, -2)

    def _drawn(self, head_dim_qk: int, device: str, seed: int) -> Tensors:
        """q, k and v of a width; nothing far apart."""
        number = call_dtype(dtype(self.spec.precision.inputs))
        memory: MemoryLayout = "contiguous" if self.memory == "far" else self.memory
        head_dim_v, cache = self.spec.problem.head_dim.v, CACHE_TYPE if has_cache(self.spec) else None
        return random_inputs(
            self.shape, head_dim_qk, head_dim_v, number, device, seed, memory, self.kind, cache
        )

    @torch_defaults()
    def declared(self, device: str) -> dict[str, Any]:
        """What the call passes by name: what mask and score read, a sink, and lengths.

        A sink has the size of a row's log-sum-exp, and is f32 or as the inputs are; that of the first head may be none.
        """
        found = declared_inputs(self.spec.arguments, self.shape, device, self.seed)
        if SINK in found:
            sink = 6.0 * found[SINK]
            sink[: self.seed % 3 // 2] = -math.inf
            found[SINK] = sink.to(call_dtype(dtype(self.spec.precision.inputs))) if self.seed % 2 else sink
        found = with_drawn_map(found, self.seed) | self.shape.arguments(device)
        are_one = self.kind == "integers"  # whose sums are exact
        return found | drawn_descales(self.spec, self.shape, device, self.seed, are_one)


def _read_shape(data: dict[str, Any]) -> Shape:
    """A shape out of what `asdict` made of it."""
    cuts: dict[str, Any] = {axis: _read_cut(data[axis]) for axis in LETTERS if data.get(axis) is not None}
    return Shape(**data | cuts)


def _read_cut(data: Any) -> Cut:
    """What `asdict` made of a cut; lists are tuples."""
    fields: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in data.items()}
    return Cut(**fields)


def _fault_of_cuts(shape: Shape, spec: Spec) -> str | None:
    """What is wrong with how sequences are cut, beside the spec and the sizes."""
    for axis, letter in LETTERS.items():
        kind, cut = getattr(spec.problem, axis), getattr(shape, axis)
        if (kind if kind != "dense" else None) != (cut.kind if cut else None):
            return f"{axis} are {kind} in the spec"
        if cut is None:
            continue
        rows = (*cut.lengths, *cut.skipped, *cut.unused, cut.tail)
        if type(cut.page) is not int or (cut.page > 0) != (kind == "paged"):
            return f"{cut.page} is no number of rows of a page of {axis}"
        if not all(type(each) is int and 0 <= each <= LARGEST_LENGTH for each in rows):
            return f"a number of rows of {axis} is no integer from 0 to {LARGEST_LENGTH}"
        if any(len(each) not in (0, shape.batch) for each in (cut.skipped, cut.unused)):
            return f"{axis} have not as many rows that do not count as sequences"
        if len(cut.lengths) != shape.batch or getattr(shape, f"seqlen_{letter}") != cut.size:
            return f"sizes are not those of {axis}"
    return None


@torch_defaults()  # a demand for deterministic algorithms has torch fill what is new
def far_apart(inputs: Tensors) -> Tensors:
    """Lay values out in one storage, in which the last batch begins past 2^31 elements.

    Nothing between is ever touched, so that on a CPU it costs address space and no memory.
    """
    q = inputs[0]
    unit = 16 // q.element_size()
    sizes = [-(-x[:1].numel() // unit) * unit for x in inputs]
    step = -(-FAR // max(1, q.shape[0] - 1) // unit) * unit
    storage = q.new_empty((q.shape[0] - 1) * step + sum(sizes) if q.shape[0] > 1 else sum(sizes))
    views, start = [], 0
    for x, size in zip(inputs, sizes, strict=True):
        _, seqlen, heads, dim = x.shape
        view = storage[start:].as_strided(x.shape, (step, heads * dim, dim, 1), start)
        views.append(view.copy_(x))
        start += size
    return views[0], views[1], views[2]
