"""The schema of a spec: frozen pydantic models, and the JSON Schema that gives editors completion.

It holds types, closed sets and the words an error uses for them. What two values must be together is in rules.py;
whether the numbers fit a GPU is for the rules of the plan.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from attngen.expr import LARGEST_LENGTH, LARGEST_TILE
from attngen.expr.literals import nearest_declarations

Nearest = tuple[str, ...]

INPUTS = ("q", "k", "v")
"""What has gradients wherever anything has, in their order; what a spec declares follows."""
ALL_GRADIENTS = f"[{', '.join(INPUTS)}]"

_TENSOR_EXAMPLES = ("i32[batch, seqlen_k]",)


@dataclass(frozen=True)
class Expects:
    """What a field takes, as an error tells it: pydantic's own words are made for programs.

    Attributes:
        rule: name of the rule that a wrong value breaks.
        words: what the value must be.
        nearest: the valid values closest to a wrong one.
    """

    rule: str
    words: str
    nearest: Callable[[Any], Nearest] = lambda value: ()


def _integer(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("must be an integer")  # pydantic would take true, 64.0 and "64"
    return value


def _nearest_integer(
    lowest: int, highest: int | None = None, other: Nearest = ()
) -> Callable[[Any], Nearest]:
    def nearest(value: Any) -> Nearest:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            return other
        try:
            number = value if isinstance(value, int) else round(float(value))
        except (ValueError, OverflowError):
            return other
        return (str(max(lowest, number if highest is None else min(number, highest))),)

    return nearest


def _one_of(rule: str, *choices: str) -> Expects:
    def nearest(value: Any) -> Nearest:
        text = str(value)
        longer = tuple(choice for choice in choices if text and choice.startswith(text))
        return longer or tuple(get_close_matches(text, choices, n=2, cutoff=0.5)) or choices

    return Expects(rule, f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0], nearest)


def _nearest_name(value: Any) -> Nearest:
    word = re.sub(r"[^A-Za-z0-9_.-]+", "_", str(value)).strip("_.-")
    return (word[:100],) if word else ()


def _boolean(value: Any) -> Any:
    if not isinstance(value, bool) and value != "auto":
        raise ValueError("must be true, false or auto")  # pydantic would take 1 and "yes"
    return value


def _flag(value: Any) -> Any:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")  # pydantic would take 1 and "yes"
    return value


_Positive = Annotated[int, Field(ge=1), BeforeValidator(_integer)]
_Auto = Literal["auto"]

Size = Annotated[_Positive, Expects("positive-integer", "a positive integer", _nearest_integer(1))]
SizeOrAuto = Annotated[
    _Positive | _Auto,
    Expects("positive-integer", "a positive integer or auto", _nearest_integer(1, other=("auto",))),
]
CountOrAuto = Annotated[
    Annotated[int, Field(ge=1, le=1024), BeforeValidator(_integer)] | _Auto,
    Expects(
        "positive-integer", "a positive integer or auto, at most 1024", _nearest_integer(1, 1024, ("auto",))
    ),
]
"""Of stages, warps or warpgroups: far more than any rule allows, few enough to make a plan that says so."""
Flag = Annotated[
    bool, BeforeValidator(_flag), Expects("boolean", "true or false", lambda value: ("true", "false"))
]
FlagOrAuto = Annotated[
    bool | _Auto,
    BeforeValidator(_boolean),
    Expects("boolean", "true, false or auto", lambda value: ("true", "false", "auto")),
]
Length = Annotated[
    int,
    Field(ge=0, le=LARGEST_LENGTH),
    BeforeValidator(_integer),
    Expects("length", f"an integer from 0 to 2^30 - {LARGEST_TILE}", _nearest_integer(0, LARGEST_LENGTH)),
]
BlockSize = Annotated[
    int,
    Field(ge=1, le=LARGEST_LENGTH),
    BeforeValidator(_integer),
    Expects(
        "positive-integer",
        f"a positive integer, at most 2^30 - {LARGEST_TILE}",
        _nearest_integer(1, LARGEST_LENGTH),
    ),
]
OneLength = Annotated[
    Annotated[int, Field(ge=0, le=LARGEST_LENGTH), BeforeValidator(_integer)] | None,
    Expects("length", f"an integer from 0 to 2^30 - {LARGEST_TILE}", _nearest_integer(0, LARGEST_LENGTH)),
]
"""A length that may be left out, where another key stands for it; which, is for shape_rules.py."""
OnePageSize = Annotated[
    Annotated[int, Field(ge=1, le=LARGEST_LENGTH), BeforeValidator(_integer)] | None,
    Expects(
        "positive-integer",
        f"a positive integer, at most 2^30 - {LARGEST_TILE}",
        _nearest_integer(1, LARGEST_LENGTH),
    ),
]
"""A size that may be left out, where keys are in no pages; which, is for shape_rules.py."""
EachLength = Annotated[
    tuple[Length, ...],
    Field(min_length=1),
    Expects("lengths", "a list of lengths, one for each sequence", lambda value: ("[5, 0, 130]",)),
]
Name = Annotated[
    str,
    Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9_.-]{0,99})?$"),
    Expects("spec-name", "letters, digits and _ . -, for files are named after it", _nearest_name),
]
Text = Annotated[str, Expects("expression-text", "an expression, written as text")]
ScalarText = Annotated[
    str,
    Expects(
        "scalar-types",
        "the text of a type, with or without a default",
        lambda value: nearest_declarations(str(value).lower()),
    ),
    Field(json_schema_extra={"pattern": r"^\s*(f32|i32|bool)\s*(=.*)?$", "examples": ["f32 = 30.0"]}),
]
TensorText = Annotated[
    str,
    Expects("tensor-types", "the text of a number format and the dimensions", lambda value: _TENSOR_EXAMPLES),
    Field(
        json_schema_extra={"pattern": r"^\s*\w+\s*\[.*\]\s*(sorted)?\s*$", "examples": list(_TENSOR_EXAMPLES)}
    ),
]
Scalars = Annotated[dict[str, ScalarText], Expects("spec-mapping", "a mapping of names to types")]
Tensors = Annotated[
    dict[str, TensorText], Expects("spec-mapping", "a mapping of names to formats and dimensions")
]
Definitions = Annotated[dict[str, Text], Expects("spec-mapping", "a mapping of names to expressions")]
Gradients = Annotated[
    tuple[
        Annotated[
            str,
            Expects(
                "known-gradients",
                "q, k, v or a declared name",
                lambda value: (f"gradients: {ALL_GRADIENTS}",),
            ),
            Field(json_schema_extra={"examples": list(INPUTS)}),
        ],
        ...,
    ],
    AfterValidator(lambda names: tuple(sorted(names, key=lambda name: (*INPUTS, name).index(name)))),
    Expects("gradients", f"a list: {ALL_GRADIENTS}, or [] for none", lambda value: (ALL_GRADIENTS,)),
    Field(json_schema_extra={"uniqueItems": True}),
]
"""Inputs in canonical order, then what is declared, as written; which names there may be is for rules.py and
gradient_rules.py, which know what a spec declares and reads."""
Target = Annotated[
    Literal["auto", "simulator", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_120"],
    _one_of("known-targets", "auto", "simulator", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_120"),
]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class HeadDim(_Model):
    """Columns of Q and K, and of V; one number stands for both."""

    qk: Size
    """Columns of Q and K."""
    v: Size
    """Columns of V and of the output."""

    @model_validator(mode="before")
    @classmethod
    def _spread(cls, value: Any) -> Any:
        is_number = isinstance(value, int) and not isinstance(value, bool)
        return {"qk": value, "v": value} if is_number else value


LengthsOf = Annotated[
    Literal["dense", "ragged", "padded"], _one_of("known-lengths", "dense", "ragged", "padded")
]
"""How queries are cut into sequences; see `attngen.plan.Lengths`."""
LengthsOfKeys = Annotated[
    Literal["dense", "ragged", "padded", "paged"],
    _one_of("known-lengths", "dense", "ragged", "padded", "paged"),
]
"""How keys are."""


class Problem(_Model):
    """What is computed."""

    head_dim: Annotated[
        HeadDim,
        Expects("head-dim", "a positive integer, or {qk: 192, v: 128}", _nearest_integer(1)),
    ]
    """Columns of Q, K and V: a number, or {qk: 192, v: 128}. The one key that must be given."""
    queries: LengthsOf = "dense"
    """Sequences of queries: dense, all of one length; ragged, one after another from cu_seqlens_q[b] on; padded, of
    which seqused_q[b] count."""
    keys: LengthsOfKeys = "dense"
    """Sequences of keys, likewise: cu_seqlens_k and seqused_k; or paged, in those pages of a cache that block_table[b]
    lists, seqused_k[b] of them. e4m3 inputs have sequences of one length."""


class Precision(_Model):
    """Number formats."""

    inputs: Annotated[
        Literal["f16", "bf16", "e4m3", "f32"], _one_of("known-formats", "f16", "bf16", "e4m3", "f32")
    ] = "bf16"
    """Of Q, K and V, and of P; f32 on the simulator only."""
    cache: Annotated[Literal["auto", "e4m3"], _one_of("known-formats", "auto", "e4m3")] = "auto"
    """Of K and V, where it is not that of the inputs: e4m3 beside bf16 or f16 queries, multiplied as f16."""
    output: Annotated[
        Literal["auto", "f16", "bf16", "f32"], _one_of("known-formats", "auto", "f16", "bf16", "f32")
    ] = "auto"
    """Of the output; auto is that of the inputs, bf16 for e4m3."""
    scales: Annotated[
        Literal["auto", "per_tensor", "per_head", "per_block", "per_token", "per_page"],
        _one_of("known-scales", "auto", "per_tensor", "per_head", "per_block", "per_token", "per_page"),
    ] = "auto"
    """What shares a scale of e4m3 inputs: all of a tensor, a head of K and V, 64 rows of Q and 128 of K and V, or each
    row of Q and K; auto is per_block. Of an e4m3 cache: all of a tensor, a head, each key of a head, or a page of it;
    auto is per_head."""
    incoherent: Annotated[Literal["none", "hadamard"], _one_of("known-transforms", "none", "hadamard")] = (
        "none"
    )
    """What Q and K are multiplied by before they become e4m3: a Hadamard matrix with random signs spreads outliers."""
    seed: Annotated[
        Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(_integer)],
        Expects("seed", "an integer from 0 to 2^63 - 1", _nearest_integer(0, 2**63 - 1)),
    ] = 0
    """Of the signs of the Hadamard matrix."""
    promote: Annotated[
        Annotated[int, Field(ge=0, json_schema_extra={"maximum": 1}), BeforeValidator(_integer)] | _Auto,
        Expects("promotion", "0 (never), 1 (every block of keys) or auto", lambda value: ("0", "1", "auto")),
    ] = "auto"
    """After how many blocks of keys the tensor core's sums of e4m3 products, which keep some 14 bits, are added to O in
    true f32: 1, or 0 for never; auto is 1 up to head_dim 128, else 0."""


class Tile(_Model):
    """The part of S that one step computes."""

    block_m: SizeOrAuto = "auto"
    """Query rows."""
    block_n: SizeOrAuto = "auto"
    """Keys."""


class Schedule(_Model):
    """In which order a block works, and with what."""

    kind: Annotated[
        Literal["auto", "serial", "fa2", "warp_specialized", "pingpong"],
        _one_of("known-schedules", "auto", "serial", "fa2", "warp_specialized", "pingpong"),
    ] = "auto"
    """serial is FlashAttention-1's Algorithm 1, fa2 FlashAttention-2's partition, warp_specialized FlashAttention-3
    without turn-taking, pingpong with it."""
    stages: CountOrAuto = "auto"
    """Blocks of K and V in shared memory at a time."""
    warps: CountOrAuto = "auto"
    """Warps of a thread block; serial and fa2."""
    warpgroups: CountOrAuto = "auto"
    """Consumer warpgroups of a thread block, 64 rows each; warp_specialized and pingpong."""
    overlap: FlagOrAuto = "auto"
    """The softmax of a block runs under the output GEMM of the one before; warp_specialized and pingpong."""
    persistent: FlagOrAuto = "auto"
    """A thread block works on many tiles, drawn from a counter; warp_specialized and pingpong."""
    order: Annotated[Literal["auto", "heads", "rows"], _one_of("known-orders", "auto", "heads", "rows")] = (
        "auto"
    )
    """Which tiles start together: the same rows of all heads, last rows first, or all rows of one head."""


class GivenBlocks(_Model):
    """The blocks of queries and keys of which every call says which are kept."""

    block_m: BlockSize
    """Query rows."""
    block_n: BlockSize
    """Keys."""


PART_STEP = 64
"""What the keys of a part are a multiple of, so that it is whole blocks."""


class SplitKeys(_Model):
    """Parts of so many keys, counted from a sequence's first."""

    keys: Annotated[
        int,
        Field(ge=PART_STEP, le=LARGEST_LENGTH, multiple_of=PART_STEP),
        BeforeValidator(_integer),
        Expects(
            "part-of-keys",
            f"a multiple of {PART_STEP}",
            lambda value: (
                (str(max(1, round(value / PART_STEP)) * PART_STEP),) if isinstance(value, int) else ()
            ),
        ),
    ]
    """Keys of a part."""


class CheckShape(_Model):
    """A shape that the spec must pass."""

    batch: Length = 1
    """Sequences."""
    heads: Length = 1
    """Query heads."""
    heads_kv: OneLength = None
    """Heads of K and V; as many as query heads where left out."""
    seqlen_q: OneLength = None
    """Rows of Q of every sequence, where queries are dense."""
    seqlen_k: OneLength = None
    """Rows of K and V, likewise."""
    seqlens_q: EachLength = ()
    """Rows of Q of each sequence, where queries are ragged or padded; in place of batch and seqlen_q."""
    seqlens_k: EachLength = ()
    """Rows of K and V, likewise."""
    page: OnePageSize = None
    """Rows of a page of K and V, where keys are paged."""


class SpecModel(_Model):
    """The keys of a spec."""

    name: Name = ""
    """For people, and for the files made from the spec."""
    target: Target = "auto"
    """Arch to build for; auto is this machine's GPU."""
    problem: Problem
    """What is computed."""
    precision: Precision = Precision()
    """Number formats."""
    scalars: Scalars = {}
    """Numbers and truth values that a call passes by keyword, for mask and score to read: cap: f32 = 30.0."""
    tensors: Tensors = {}
    """Tensors that a call passes by keyword, for mask and score to read: doc: i32[batch, seqlen_k]. A dimension is
    batch, num_heads_q, num_heads_kv, seqlen_q, seqlen_k, a positive integer, or a new name, bound by the tensor."""
    define: Definitions = {}
    """Names for expressions, to use in mask, score and each other: half: q_pos // 2, band(w): kv_idx > q_pos - w."""
    mask: Text = "full"
    """Condition under which a query sees a key: full, causal, window(128, 0), doc[b, q_pos] == doc[b, kv_idx]."""
    score: Text = "score"
    """What takes the place of the scaled score of a query and a key: softcap(score, 30.0), score + alibi(slopes)."""
    sink: Annotated[Literal["none", "per_head"], _one_of("known-sinks", "none", "per_head")] = "none"
    """A learned sink: per_head is a logit for each query head, which joins the sum of its rows without a value, and
    which a call passes as `sink`."""
    gradients: Gradients = ()
    """What a call also has gradients of: nothing, or [q, k, v] and names of what is declared and the score reads, or
    sink."""
    deterministic: Flag = True
    """Gradients are the same bits in every run; false allows sums that are added in any order: those of dQ, and of
    tables that a block of threads has no room for."""
    tile: Tile = Tile()
    """The part of S that one step computes."""
    blocks: Annotated[
        GivenBlocks | None,
        Expects(
            "given-blocks", "{block_m: 128, block_n: 128}", lambda value: ("{block_m: 128, block_n: 128}",)
        ),
    ] = None
    """Blocks of queries and keys, of which every call passes a map, or lists, of those that are kept; in these the mask
    hides what it hides. None: all are kept, and no call says anything."""
    split: Annotated[
        SplitKeys | Literal["none", "auto"],
        Expects(
            "split-of-keys", "none, auto or {keys: 1024}", lambda value: ("none", "auto", "{keys: 1024}")
        ),
    ] = "none"
    """How the keys of rows are cut into parts for different thread blocks: auto makes as many parts as fill the GPU;
    {keys: 1024} cuts at multiples of so many keys of a sequence, which then gives the same bits whatever else a call
    has. The rows of a tile are those of all query heads that share its keys."""
    schedule: Schedule = Schedule()
    """In which order a block works, and with what."""
    check: Annotated[
        tuple[CheckShape, ...],
        Expects("check-shapes", "a list of shapes, each {seqlen_q: 128, seqlen_k: 128}"),
    ] = ()
    """Shapes that the spec must pass."""


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a spec file."""
    schema = SpecModel.model_json_schema()
    head_dim = schema["$defs"]["Problem"]["properties"]["head_dim"]
    reference = {"$ref": head_dim.pop("$ref")} if "$ref" in head_dim else head_dim.pop("allOf")[0]
    head_dim["anyOf"] = [{"type": "integer", "minimum": 1}, reference]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "attngen spec"}
