"""A call as data: the values it reads and makes, and the launches that make them, in order.

What a call launches follows from what it is given and what is wanted of it (`Manifest.launches_for`): a launch whose
values are all given, or wanted by nobody, is left out. So one list holds every way to begin a call and every kernel
that may take it, and values of a prefix (`kernel.quantize`, `kernel.tables`) may be kept and given to later calls.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal

from pydantic import TypeAdapter

from attngen.arch import Arch
from attngen.plan.formulas import Formula, Guard
from attngen.plan.lengths import DENSE, Lengths
from attngen.plan.plan import KernelPlan, Param
from attngen.plan.sheets import Sheet
from attngen.quantize import ScaleKind

SCHEMA_VERSION = 11
COUNTER = "counter.ptr"
"""Value of the parameter that points at a tile counter, see `KernelEntry`."""
TICKETS = "tickets.ptr"
"""Value of the parameter that points at a counter for each tile of a launch, see `KernelEntry`."""
OPERANDS_INTAKE = "operands"
"""Name of the intake of values that an earlier call has quantised."""
GRADIENTS_INTAKE = "gradients"
"""Name of the intake of a backward pass."""


def in_bf16(tensor: str) -> str:
    """The value that is Q, K or V as a backward pass reads it where attention itself reads e4m3."""
    return f"{tensor}_bf16"


def in_f32(gradient: str) -> str:
    """The value that is a gradient in f32, whatever the type of its input."""
    return f"{gradient}_f32"


@dataclass(frozen=True)
class Value:
    """Device memory that launches read or write.

    Attributes:
        name: parameters carry "<name>.ptr", "<name>.stride_<axis>" (in elements) and "<name>.map".
        dtype: "bool", "u8", "i32", "e4m3", "f16", "bf16" or "f32".
        shape: formulas over run-time sizes; a name that is no size of the call is bound by the tensor that is passed.
        source: who makes it. "given": the caller. "output": the call, unless the caller passes memory for it.
            "scratch": the call, for itself. "kept": the call, which may use the memory of an earlier one.
        argument: by which name a call passes it; None where only the call makes it. Of what is declared several values
            of one argument are formats of it, of which a call passes one: the addresses of the others are 0.
        axes: what its dimensions are, if rows of heads; a row is contiguous and starts on 16 bytes. Strides are named
            after them; where there are none, they are numbered and may be any.
        layout: "dense": a tensor with strides.
        optional: an address of 0 says that nobody wants it.
        zeroed: it is 0 before the first launch that reads it.
        shared: one element stands for all.
    """

    name: str
    dtype: str
    shape: tuple[Formula, ...]
    source: Literal["given", "output", "scratch", "kept"]
    argument: str | None = None
    axes: tuple[str, ...] = ()
    layout: Literal["dense"] = "dense"
    optional: bool = False
    zeroed: bool = False
    shared: bool = False

    @property
    def passed_as(self) -> str:
        """What a caller calls it."""
        return self.argument or self.name

    @property
    def stride_names(self) -> tuple[str | int, ...]:
        """What its strides are called."""
        return self.axes or tuple(range(len(self.shape)))


@dataclass(frozen=True)
class Scalar:
    """A number that the mask or the score reads; the parameter of value "scalar.<name>" carries it, a bool as 0 or 1.

    Attributes:
        type: "bool", "i32" or "f32".
        default: what a call passes that says nothing; None where it must say.
    """

    name: str
    type: str
    default: int | float | bool | None


@dataclass(frozen=True)
class Intake:
    """Values that a call is given together, beside what the spec declares: one way to begin.

    Attributes:
        values: those of Q, K and V, then those that are passed by name.
    """

    name: str
    values: tuple[str, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        """The values of Q, K and V."""
        return self.values[:3]

    @property
    def beside(self) -> tuple[str, ...]:
        """The values that are passed by name."""
        return self.values[3:]


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel on a one-dimensional grid.

    Attributes:
        grid: blocks.
        tiles: what the blocks work on, together. A kernel counts them in an i32: the last tile's number, plus the
            grid's blocks where a block may work on many, must be at most 2^31 - 1.
        reads, writes: names of values.
        when: which calls it takes; None for all. Of launches that write one value, the first that may takes the call.
    """

    kernel: str
    grid: Formula
    tiles: Formula
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    when: Guard | None = None


@dataclass(frozen=True)
class TensorMapEntry:
    """A descriptor of the copy engine, as cuTensorMapEncodeTiled makes it.

    It has four dimensions, (cols, seqlen, heads, batch). Strides are the value's own, in bytes. No interleave, out of
    bounds reads as zeros.

    Attributes:
        value: whose; the parameter of value "<value>.map" carries the descriptor.
        dtype: of its elements.
        dims: extents, cols first.
        box: extents of one copy, cols first.
        swizzle_bytes: span of the swizzle.
    """

    value: str
    dtype: str
    dims: tuple[Formula, ...]
    box: tuple[Formula, ...]
    swizzle_bytes: int


@dataclass(frozen=True)
class KernelEntry:
    """A kernel: its C symbol, its block, and the fields of the one struct it takes by value.

    The fields stand in the order given, each aligned to its size: pointer and i64 to 8 bytes, i32 and f32 to 4, a
    tensor map of 128 bytes to 64. A parameter of value "counter.ptr" points at an i32 in device memory that is 0
    before the launch, that the kernel leaves at 0, and that no launch which may run at the same time shares;
    one that starts early, in the same stream, touches it only after its wait. "tickets.ptr" points at as many of them
    as the launch has tiles; a kernel of these needs no tile counter beside.

    Attributes:
        module: name of the .cu and .cubin that hold it.
        repeats: whether a block may work on many tiles, and look once more than there is work for it.
        starts_early: a launch may have the attribute "programmatic stream serialization": the kernel itself waits for
            what came before it in the stream. Without the attribute it is as right, and starts later.
    """

    name: str
    module: str
    threads: int
    smem_bytes: int
    params: tuple[Param, ...]
    tensor_maps: tuple[TensorMapEntry, ...]
    repeats: bool
    starts_early: bool


@dataclass(frozen=True)
class Manifest:
    """What a program must know to launch a call's kernels, in any language; it stands beside the .cu as .json.

    Parameters carry by the name of their value: of `values` addresses, strides and tensor maps; "scalar.<name>";
    run-time sizes by their own names, and as "size.<name>" those that tensors of the spec are declared with; what
    `softmax_scale` becomes (`attngen.scaling.scale_values`), and the size of a page (`attngen.plan.pages.division_by`);
    "accumulates", 1 where gradients are added to what their
    memory holds. What a call has not is 0.

    Attributes:
        scales, hadamard: of e4m3 operands, see `attngen.quantize.Operands`; None and False for other inputs.
        score_factor: the constant factor of the score that is left to the exponentials.
        intakes: ways to begin a call.
        launches: in order; which of them a call needs says `launches_for`.
        lengths: how queries and keys are cut into sequences.
    """

    name: str
    arch: str
    head_dim_qk: int
    head_dim_v: int
    inputs: str
    output: str
    scales: ScaleKind | None
    hadamard: bool
    mask: str
    score: str
    score_factor: float
    spec_digest: str
    values: tuple[Value, ...]
    scalars: tuple[Scalar, ...]
    intakes: tuple[Intake, ...]
    kernels: tuple[KernelEntry, ...]
    launches: tuple[Launch, ...]
    lengths: Lengths = DENSE
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """The manifest as text; the same call gives the same bytes."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Read what `to_json` wrote.

        Raises:
            ValueError: the text is of another schema version.
        """
        version = json.loads(text).get("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(f"manifest schema_version is {version!r}, this attngen reads {SCHEMA_VERSION}")
        return TypeAdapter(cls).validate_json(text)

    @cached_property
    def value_of(self) -> Mapping[str, Value]:
        """Values by name."""
        return {value.name: value for value in self.values}

    @cached_property
    def kernel_of(self) -> Mapping[str, KernelEntry]:
        """Kernels by name."""
        return {kernel.name: kernel for kernel in self.kernels}

    @property
    def declared(self) -> tuple[Value, ...]:
        """The tensors that calls pass by name: those of the spec's expressions, and those that say lengths."""
        begun = {name for intake in self.intakes for name in intake.values}
        return tuple(value for value in self.values if value.source == "given" and value.name not in begun)

    @property
    def kept(self) -> tuple[str, ...]:
        """The values that outlive a call."""
        return tuple(value.name for value in self.values if value.source == "kept")

    def launches_for(
        self, given: Collection[str], wanted: Iterable[str], sizes: Mapping[str, int]
    ) -> tuple[Launch, ...]:
        """What a call launches, in order.

        Args:
            given: names of values that the caller passes.
            wanted: names of values to make.
            sizes: of the call, for the guards.

        Raises:
            KeyError: a wanted value can not be made of what is given; its name.
        """
        writers: dict[str, list[Launch]] = {}
        for launch in self.launches:
            if launch.when is None or launch.when.holds(sizes):
                for name in launch.writes:
                    writers.setdefault(name, []).append(launch)

        def can_have(name: str) -> bool:
            return name in given or any(all(map(can_have, each.reads)) for each in writers.get(name, ()))

        chosen: set[str] = set()

        def need(name: str) -> None:
            if name in given:
                return
            writer = next((each for each in writers.get(name, ()) if all(map(can_have, each.reads))), None)
            if writer is None:
                raise KeyError(name)
            chosen.add(writer.kernel)
            for read in writer.reads:
                need(read)

        for name in wanted:
            need(name)
        return tuple(launch for launch in self.launches if launch.kernel in chosen)


@dataclass(frozen=True)
class Call:
    """What a spec became on an arch: the manifest's own facts, and the kernels behind its launches.

    Attributes:
        manifest: what a program must know to launch it.
        kernels: programs of Steps, and sheets.
    """

    arch: Arch
    manifest: Manifest
    kernels: tuple[KernelPlan | Sheet, ...]

    @cached_property
    def kernel_of(self) -> Mapping[str, KernelPlan | Sheet]:
        """Kernels by name."""
        return {kernel.name: kernel for kernel in self.kernels}

    @cached_property
    def modules(self) -> Mapping[str, tuple[KernelPlan | Sheet, ...]]:
        """The kernels of each text, by its name."""
        names = dict.fromkeys(kernel.module for kernel in self.kernels)
        return {name: tuple(k for k in self.kernels if k.module == name) for name in names}

    @cached_property
    def programs(self) -> tuple[KernelPlan, ...]:
        """The attention kernels, those for the fewest keys first."""
        return tuple(plan for plan in self._plans if plan.direction == "forward")

    @cached_property
    def gradients(self) -> tuple[KernelPlan, ...]:
        """The kernels of the backward pass; none where the spec asks for no gradients."""
        return tuple(plan for plan in self._plans if plan.direction == "backward")

    @property
    def _plans(self) -> tuple[KernelPlan, ...]:
        return tuple(kernel for kernel in self.kernels if isinstance(kernel, KernelPlan))

    @property
    def attention(self) -> KernelPlan:
        """The attention kernel that takes calls of any size."""
        return self.programs[-1]

    def serving(self, sizes: Mapping[str, int]) -> KernelPlan:
        """The attention kernel that takes a call of these sizes, as far as they are known."""
        others = (plan for plan in self.programs[:-1] if plan.guard is not None and plan.guard.holds(sizes))
        return next(others, self.attention)
