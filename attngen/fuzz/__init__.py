"""Fuzzing: cases drawn by Hypothesis, properties of attention, coverage, and failures made small."""

from attngen.fuzz.case import Case
from attngen.fuzz.coverage import Coverage
from attngen.fuzz.properties import RULES, PropertyFailure, Subject
from attngen.fuzz.search import FuzzReport, fuzz, reproduce

__all__ = ["RULES", "Case", "Coverage", "FuzzReport", "PropertyFailure", "Subject", "fuzz", "reproduce"]
