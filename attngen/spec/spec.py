"""The Spec: a validated description of one kernel that knows where each of its values was written."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property
from typing import Any

from attngen.errors import Location
from attngen.expr import (
    GIVEN_BLOCKS,
    SINK,
    Expr,
    conjunction,
    kept_block,
    parse_mask,
    parse_score,
    to_text,
)
from attngen.expr.declarations import SORTED, Declarations, TensorType
from attngen.expr.declare import read_declarations
from attngen.spec.document import dump_text
from attngen.spec.models import (
    CheckShape,
    GivenBlocks,
    Precision,
    Problem,
    Schedule,
    SpecModel,
    SplitKeys,
    Tile,
)
from attngen.spec.source import Mark


@dataclass(frozen=True, repr=False)
class Spec:
    """A frozen spec, equal to another with the same values. Make one with `attngen.spec.load`.

    Attributes:
        name: of the spec, for people and files; may be empty.
        target: name of an arch, or "auto".
        problem, precision, sink, gradients, deterministic, tile, split, schedule, check: as in the schema.
        scalars, tensors, define: what the expressions may read besides the language's own names, as written.
        mask, score: expressions, as written.
        blocks: of which calls say which are kept; None where they do not.
        marks: where each value was written, by its dotted path; empty for a spec that came from no text.
    """

    name: str
    target: str
    problem: Problem
    precision: Precision
    scalars: Mapping[str, str] = field(hash=False)
    tensors: Mapping[str, str] = field(hash=False)
    define: Mapping[str, str] = field(hash=False)
    mask: str
    score: str
    sink: str
    gradients: tuple[str, ...]
    deterministic: bool
    tile: Tile
    blocks: GivenBlocks | None
    split: str | SplitKeys
    schedule: Schedule
    check: tuple[CheckShape, ...]
    marks: Mapping[str, Mark] = field(default_factory=dict, compare=False)

    def __repr__(self) -> str:
        return f"Spec({self.to_dict()!r})"

    @classmethod
    def from_model(cls, model: SpecModel, marks: Mapping[str, Mark]) -> "Spec":
        """The spec of validated values."""
        return cls(**{key: getattr(model, key) for key in SpecModel.model_fields}, marks=dict(marks))

    @cached_property
    def _declared(self) -> Declarations:
        """What the texts may read besides the language's own names."""
        return read_declarations(self.scalars, self.tensors, self.define).declarations

    @property
    def has_sink(self) -> bool:
        """Whether a learned sink joins the sum of each row."""
        return self.sink != "none"

    @cached_property
    def arguments(self) -> Declarations:
        """What a call passes by name: what is declared, and the sink, which expressions do not read."""
        if not self.has_sink:
            return self.declarations
        sink = TensorType(SINK, "f32", ("num_heads_q",))
        return replace(self.declarations, tensors={**self.declarations.tensors, SINK: sink})

    @cached_property
    def declarations(self) -> Declarations:
        """What the expressions read besides the language's own names: what is declared, and the map of given blocks."""
        blocks = self.blocks
        if blocks is None:
            return self._declared
        tensors = {**self._declared.tensors, GIVEN_BLOCKS.name: GIVEN_BLOCKS}
        return replace(self._declared, tensors=tensors, blocks=(blocks.block_m, blocks.block_n))

    @cached_property
    def mask_expr(self) -> Expr:
        """The mask as a tree, in which a pair is seen only where its block is kept."""
        mask = parse_mask(self.mask, self._declared)
        if self.blocks is None:
            return mask
        return conjunction((kept_block(self.blocks.block_m, self.blocks.block_n), mask))

    @cached_property
    def score_expr(self) -> Expr:
        """The score as a tree."""
        return parse_score(self.score, self._declared)

    def locate(self, path: str) -> Location | None:
        """Where the value at a dotted path was written; None where it was not written, or not in a text."""
        mark = self.marks.get(path)
        return mark.value_location if mark else None

    def replace(self, changes: Mapping[str, Any]) -> "Spec":
        """A spec with other values at some dotted paths: `{"tile.block_n": 64}`.

        Raises:
            SpecError: the result is no legal spec; a new value stands in a file called `<replace>`.
        """
        from attngen.spec.load import replace

        return replace(self, changes)

    def to_dict(self) -> dict[str, Any]:
        """What differs from the defaults, as plain data that `load` takes."""
        data = self._model.model_dump(mode="json", exclude_defaults=True)
        head_dim = data["problem"]["head_dim"]
        if head_dim["qk"] == head_dim["v"]:
            data["problem"]["head_dim"] = head_dim["qk"]
        return data

    def to_yaml(self) -> str:
        """The spec as YAML; `load` of it is equal to this one."""
        return dump_text(self.to_dict())

    def digest(self) -> str:
        """sha256 of what the kernel depends on: all but name and check, expressions by their meaning.

        Definitions are part of that meaning; scalars and tensors count in the order in which they are declared.
        """
        data = self._model.model_dump(mode="json", exclude={"name", "check", "scalars", "tensors", "define"})
        if not self.gradients:
            del data["gradients"]
        if self.deterministic:
            del data["deterministic"]
        if self.blocks is None:
            del data["blocks"]
        if not self.has_sink:
            del data["sink"]
        if self.split == "none":
            del data["split"]
        data |= {"mask": to_text(self.mask_expr), "score": to_text(self.score_expr)}
        for axis in ("queries", "keys"):
            if data["problem"][axis] == "dense":
                del data["problem"][axis]
        data["problem"]["direction"] = "forward"  # so that digests stay what they were when this was a key
        if self.precision.inputs != "e4m3":  # whose fields these are
            of_cache = ("cache", "scales") if self.precision.cache == "e4m3" else ()
            data["precision"] = {name: data["precision"][name] for name in ("inputs", "output", *of_cache)}
        else:
            del data["precision"]["cache"]
        if self.scalars:
            data["scalars"] = [astuple(scalar) for scalar in self.declarations.scalars.values()]
        if self.tensors:
            # A word behind three fields, so that those of a tensor that is not sorted digest as they always have.
            data["tensors"] = [
                (each.name, each.dtype, each.dims, *((SORTED,) if each.is_sorted else ()))
                for each in self.declarations.tensors.values()
            ]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    @property
    def _model(self) -> SpecModel:
        return SpecModel.model_construct(**{key: getattr(self, key) for key in SpecModel.model_fields})
