"""How scores are brought to what exponentials take: softmax_scale, and whether a maximum is taken off."""

import math

SMALLEST_SCALE = 2.0**-126
"""FLT_MIN stands for a scale of 0, so that a score of -inf stays -inf."""
SMALLEST_SEEDED_SCALE = 2.0**-60
"""It stands for a scale of 0 where something is added to the product before scaling, and divided by the scale."""
COARSE_SCORES = 2.0**27
"""Scores in log2 units that are as large as this or larger lie at least 4 apart in f32, and a product with the scale is
rounded by up to 8. A row whose maximum is so large takes another way (`plan.steps.RowMax`)."""
SHARE_OF_EXPONENTS = 5 / 8
"""Of those that the format of P has above 1. P is then as precise as near 1; f32 holds sums over a million keys of V
up to 2^27."""


def coarse_where_scales_are_chosen(largest_p: float) -> float:
    """From which maximum on, in log2 units, a row chooses a power of two for its scale.

    Until then its largest exponent is off 0 by up to half a unit in the last place of the maximum, for which P must
    have room: 8 where it is f16, 32 else. From then on its other scores are 8 exponents below or more, mostly 11, or 32
    and 46.

    Args:
        largest_p: the largest finite number of P's format.
    """
    return 2.0**28 if largest_p < 2.0**32 else 2.0**30


def needs_no_maximum(magnitude: float, largest_p: float) -> bool:
    """Whether scores are so small that their exponentials need no maximum to be taken relative to.

    Args:
        magnitude: what no score is larger than, in natural units.
        largest_p: the largest finite number of P's format.
    """
    return magnitude * math.log2(math.e) <= SHARE_OF_EXPONENTS * math.log2(largest_p)


def scale_values(softmax_scale: float, score_factor: float) -> dict[str, float]:
    """The run-time values of a scale, by the names that `Param.value` has for them.

    Args:
        softmax_scale: of the call.
        score_factor: what the exponentials take a score times, see `Pairs`.
    """
    log2_e = math.log2(math.e)
    size = abs(softmax_scale)
    seeded = max(size, SMALLEST_SEEDED_SCALE)
    return {
        "scale_is_negative": int(softmax_scale < 0),
        "softmax_scale": softmax_scale,
        "product_log2": softmax_scale * score_factor * log2_e,
        "gradient_scale": softmax_scale * score_factor,
        "softmax_scale_log2": max(size, SMALLEST_SCALE) * log2_e,
        "score_factor_log2": score_factor * log2_e,
        "seeded_scale": seeded,
        "seeded_scale_inverse": 1 / seeded,
        "seeded_scale_log2": seeded * score_factor * log2_e,
    }
