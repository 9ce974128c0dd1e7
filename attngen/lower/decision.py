"""Decisions: what follows from features and a choice of numbers, before anything is given a place."""

from dataclasses import dataclass, replace

from attngen.lower.choice import AnyChoice, WarpgroupChoice
from attngen.lower.features import Features, is_capped_product
from attngen.lower.scale_places import scales
from attngen.plan.steps import ByTanh
from attngen.schedules import Pairs, Scales
from attngen.schedules.pairs import loads_by_key

COLUMNS_BY_TANH, COLUMNS_BY_TANH_AND_MORE = 224, 128
"""The most columns of O with which a score is computed in two steps: of a capped product, and of any other, which also
wants two warpgroups and no lookup by key. NVRTC 13.0.88 compiles these without spills, and not all that are beyond."""


@dataclass(frozen=True)
class Decision:
    """How a kernel of a schedule and a choice works scores out.

    Attributes:
        pairs: the mask and the score, what the score GEMM starts from taken out.
        by_tanh: the two steps of a score by its tanh; None where it is in one.
        bounded_scores: exponentials are taken under no maximum.
        integer_maxima: see `RowMax.by_integers`.
        scales: of 8-bit operands; where the producer stages them is not decided here.
        has_sink: a learned sink joins the sum of each row.
    """

    pairs: Pairs
    by_tanh: ByTanh | None
    bounded_scores: bool
    integer_maxima: bool
    scales: Scales | None
    has_sink: bool

    @classmethod
    def of(cls, features: Features, schedule: str, choice: AnyChoice) -> "Decision":
        """What follows for a schedule. Serial keeps its maxima in device memory, and does nothing that follows."""
        pairs = features.pairs_of(schedule).within(choice.block_m, choice.block_n)
        if features.scales:  # hidden keys have a part in scales, and V of e4m3 has its keys in columns
            pairs = replace(pairs, shown=None)
        keeps_maxima = schedule == "serial"
        kind, warpgroups, by_integers = (
            features.scales,
            2,
            False,
        )  # warps have as many registers as those of two
        if isinstance(choice, WarpgroupChoice):
            warpgroups, by_integers = choice.warpgroups, choice.integer_maxima
        return cls(
            pairs=pairs,
            by_tanh=_two_steps_by_tanh(pairs, features.head_dim_v, warpgroups),
            bounded_scores=not (keeps_maxima or features.needs_maximum),
            integer_maxima=keeps_maxima or by_integers or (kind is not None and pairs.modifies_scores),
            scales=scales(kind, choice.block_m, choice.block_n, choice.stages) if kind else None,
            has_sink=features.has_sink,
        )


def _two_steps_by_tanh(pairs: Pairs, v_cols: int, warpgroups: int) -> ByTanh | None:
    """`Pairs.by_tanh`, where a kernel of so many columns of O and warpgroups has the registers for it."""
    if is_capped_product(pairs.score):
        has_room = v_cols <= COLUMNS_BY_TANH
    else:
        has_room = v_cols <= COLUMNS_BY_TANH_AND_MORE and warpgroups == 2 and not loads_by_key(pairs.score)
    return pairs.by_tanh if has_room else None
