"""Specs: the schema, and the YAML loader that keeps every value's place."""

from attngen.spec.load import load
from attngen.spec.models import INPUTS, CheckShape, HeadDim, Precision, Problem, Schedule, Tile, json_schema
from attngen.spec.spec import Spec

__all__ = [
    "INPUTS",
    "CheckShape",
    "HeadDim",
    "Precision",
    "Problem",
    "Schedule",
    "Spec",
    "Tile",
    "json_schema",
    "load",
]
