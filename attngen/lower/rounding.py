"""Sizes rounded to the steps of instructions and alignments."""


def round_up(value: int, step: int) -> int:
    """The smallest multiple of `step` that is at least `value`."""
    return -(-value // step) * step
