"""Fuzzing: cases drawn by Hypothesis, properties of attention, coverage, and failures made small."""
