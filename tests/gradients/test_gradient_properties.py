"""Properties of gradients on random calls, by the programs of two archs on the simulator."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tests.effort import examples
from tests.gradients import gradient_properties as properties
from tests.gradients.backward_cases import MASKS, BackwardCase
from tests.gradients.gradient_properties import Property, Subject

TARGETS = st.sampled_from(("sm_80", "sm_90a"))
LENGTH = st.sampled_from((1, 2, 32, 63, 64, 65, 96, 127, 128, 129)) | st.integers(1, 140)
HEADS = st.sampled_from(((1, 1), (2, 1), (4, 2), (3, 1)))
ANY_MASK = st.sampled_from(("full", *MASKS))


def calls(
    mask: SearchStrategy[str] | None = None,
    score: str = "score",
    lengths: SearchStrategy[tuple[int, int]] | None = None,
    heads: SearchStrategy[tuple[int, int]] = HEADS,
) -> SearchStrategy[BackwardCase]:
    """Cases of a batch of two; all masks, lengths and heads where nothing is said of them."""
    return st.builds(
        BackwardCase,
        mask=ANY_MASK if mask is None else mask,
        score=st.just(score),
        lengths=st.tuples(LENGTH, LENGTH) if lengths is None else lengths,
        heads=heads,
        head_dim=st.sampled_from(((32, 32), (40, 32), (64, 64), (192, 32))),
        inputs=st.sampled_from(("bf16", "f16")),
    )


FULL = st.just("full")
LONG = st.integers(2, 140).map(lambda length: (length, length))
HIDING = st.sampled_from(
    (
        "q_idx % 3 != 0 and kv_idx % 5 != 1",
        "q_idx >= 2 and kv_idx < lens[b]",
        "causal and q_idx >= 3 and kv_idx < 60",
        "window(10, 3) and q_idx >= 60",
    )
)
PROPERTIES: dict[Property, SearchStrategy[BackwardCase]] = {
    properties.whole_numbers_are_exact: calls(),
    properties.the_gradient_of_scores_sums_to_that_of_lse: calls(),
    properties.a_gradient_of_lse_alone_has_no_part_in_dv: calls(FULL | st.just("causal"), lengths=LONG),
    properties.a_constant_in_all_scores_changes_nothing: calls(),
    properties.very_low_scores_are_recovered: calls(),
    properties.permuted_keys_permute_dk_and_dv: calls(FULL, "softcap(score, 3.0)"),
    properties.a_part_of_a_batch_has_its_own_gradients: calls(score="softcap(score, 3.0)"),
    properties.two_documents_are_two_calls: calls(lengths=LONG),
    properties.a_group_sums_over_its_heads: calls(heads=st.sampled_from(((2, 1), (4, 2), (3, 1)))),
    properties.a_head_keeps_to_itself: calls(heads=st.sampled_from(((2, 2), (4, 2), (6, 2)))),
    properties.a_window_of_all_is_full: calls(FULL),
    properties.powers_of_two_pass_through: calls(FULL, lengths=LONG),
    properties.what_sees_nothing_touches_nothing: calls(
        HIDING, lengths=st.just((129, 96)) | st.just((75, 130))
    ),
    properties.a_factor_of_the_score_is_one_of_the_scale: calls(),
}
"""Each with the calls that it speaks of."""


@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda each: each.__name__)
def test_it_holds(holds: Property) -> None:
    """Whatever the mask, the lengths, the heads, the format and the arch."""

    @settings(max_examples=examples(0.2))
    @given(TARGETS, PROPERTIES[holds])
    def hold(target: str, case: BackwardCase) -> None:
        holds(Subject(target), case)

    hold()
