"""The Spec: a validated description of one kernel that knows where each of its values was written."""

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from attngen.errors import Location
from attngen.expr import Expr, parse_mask, parse_score, to_text
from attngen.spec.document import dump_text
from attngen.spec.schema import CheckShape, Precision, Problem, Schedule, SpecModel, Tile
from attngen.spec.source import Mark


class Spec:
    """A frozen spec. Make one with `attngen.spec.load`.

    Attributes:
        name: of the spec, for people.
        target: arch, or "auto".
        problem, precision, tile, schedule, check: as in the schema.
        mask, score: expressions, as written.
    """

    def __init__(self, model: SpecModel, marks: Mapping[str, Mark] | None = None) -> None:
        self._model = model
        self._marks = dict(marks or {})
        self.name: str = model.name
        self.target: str = model.target
        self.problem: Problem = model.problem
        self.precision: Precision = model.precision
        self.mask: str = model.mask
        self.score: str = model.score
        self.tile: Tile = model.tile
        self.schedule: Schedule = model.schedule
        self.check: tuple[CheckShape, ...] = model.check

    def __repr__(self) -> str:
        return f"Spec({self.to_dict()!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spec) and self._model == other._model

    def __hash__(self) -> int:
        return hash(self._model)

    @cached_property
    def mask_expr(self) -> Expr:
        """The mask as a tree."""
        return parse_mask(self.mask)

    @cached_property
    def score_expr(self) -> Expr:
        """The score as a tree."""
        return parse_score(self.score)

    def locate(self, path: str) -> Location | None:
        """Where the value at a dotted path was written; None where it was not written, or not in a text."""
        mark = self._marks.get(path)
        return mark.value_location if mark else None

    def replace(self, changes: Mapping[str, Any]) -> "Spec":
        """A spec with other values at some dotted paths: `{"tile.block_n": 64}`.

        Raises:
            SpecError: the result is no legal spec.
        """
        from attngen.spec.load import validate

        data = self.to_dict()
        for path, value in changes.items():
            *parents, last = path.split(".")
            place = data
            for key in parents:
                inner = place.get(key)
                place[key] = inner if isinstance(inner, dict) else {}
                place = place[key]
            place[last] = value
        return validate(data, file="<replace>")

    def to_dict(self) -> dict[str, Any]:
        """What differs from the defaults, as plain data."""
        data = self._model.model_dump(mode="json", exclude_defaults=True)
        head_dim = data["problem"]["head_dim"]
        if head_dim["qk"] == head_dim["v"]:
            data["problem"]["head_dim"] = head_dim["qk"]
        return data

    def to_yaml(self) -> str:
        """The spec as YAML."""
        return dump_text(self.to_dict())

    def digest(self) -> str:
        """sha256 of what the kernel depends on: all but name and check, expressions by their meaning."""
        data = self._model.model_dump(mode="json", exclude={"name", "check"})
        data |= {"mask": to_text(self.mask_expr), "score": to_text(self.score_expr)}
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
