"""The schema of a spec: frozen pydantic models, and the JSON Schema that gives editors completion.

It checks types, closed sets and head dims. Whether the numbers fit a GPU is for the rules of the plan.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from attngen.arch import ARCHS

Auto = Literal["auto"]


def _strict_int(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("must be an integer")
    return value


Count = Annotated[int, BeforeValidator(_strict_int), Field(ge=1)]
Length = Annotated[int, BeforeValidator(_strict_int), Field(ge=0)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HeadDim(_Model):
    """Columns of Q and K, and of V."""

    qk: Count
    v: Count


class Problem(_Model):
    """What is computed."""

    direction: Literal["forward"] = "forward"
    head_dim: HeadDim


class Precision(_Model):
    """Number formats of Q, K, V and of the output; f32 inputs on the simulator only."""

    inputs: Literal["f16", "bf16", "f32"] = "bf16"
    output: Literal["auto", "f16", "bf16", "f32"] = "auto"


class Tile(_Model):
    """Query rows and keys of one block."""

    block_m: Count | Auto = "auto"
    block_n: Count | Auto = "auto"


class Schedule(_Model):
    """In which order, by how many warps, with how many blocks of K and V in shared memory."""

    kind: Literal["auto", "serial", "fa2"] = "auto"
    stages: Count | Auto = "auto"
    warps: Count | Auto = "auto"


class CheckShape(_Model):
    """A shape that the spec must pass; heads_kv is heads where left out."""

    batch: Length = 1
    heads: Length = 1
    heads_kv: Length | None = None
    seqlen_q: Length
    seqlen_k: Length


class SpecModel(_Model):
    """The keys of a spec."""

    name: str = ""
    target: Literal["auto", "simulator", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_120"] = "auto"
    problem: Problem
    precision: Precision = Precision()
    mask: str = "full"
    score: str = "score"
    tile: Tile = Tile()
    schedule: Schedule = Schedule()
    check: tuple[CheckShape, ...] = ()


_SHORT_HEAD_DIM = {"type": "integer", "minimum": 1, "description": "head_dim of Q, K and V alike"}


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a spec file."""
    schema = SpecModel.model_json_schema()
    problem = schema["$defs"]["Problem"]["properties"]
    problem["head_dim"] = {"anyOf": [_SHORT_HEAD_DIM, problem["head_dim"]]}
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "attngen spec"
    return schema


GPU_HEAD_DIMS = range(32, 257, 8)
SIMULATOR_HEAD_DIMS = range(1, 513)


def legal_head_dims(target: str) -> range:
    """Head dims that a target takes."""
    return SIMULATOR_HEAD_DIMS if target in ARCHS and not ARCHS[target].emits else GPU_HEAD_DIMS
