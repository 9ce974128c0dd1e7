"""Specs: the schema, and the YAML loader that keeps every value's place."""

from attngen.spec.load import load
from attngen.spec.models import (
    INPUTS,
    PART_STEP,
    CheckShape,
    HeadDim,
    Precision,
    Problem,
    Schedule,
    SplitKeys,
    Tile,
    json_schema,
)
from attngen.spec.spec import Spec

__all__ = [
    "INPUTS",
    "PART_STEP",
    "CheckShape",
    "HeadDim",
    "Precision",
    "Problem",
    "Schedule",
    "Spec",
    "SplitKeys",
    "Tile",
    "json_schema",
    "load",
]
