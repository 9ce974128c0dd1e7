"""How blocks of several roles may end: without waiting for one another, their counters, tiles and rows accounted for.

The programs are of the Steps in `warpgroup_steps`; one tile unless said otherwise.
"""

import re

import pytest
from small_plans import call_of, warpgroup_plan
from warpgroup_steps import (
    CLEAR_O,
    DRAW,
    END,
    FENCE,
    FIRST_TURN,
    FULL_K,
    FULL_Q,
    FULL_V,
    LAND_S,
    LAST_FREES,
    LOAD_K,
    LOAD_Q,
    MEET,
    OURS,
    PASS_TURN,
    SCORES,
    STAGE,
    STORE,
    STORED,
    TAKE,
    TAKE_TURN,
    USE_K,
    programs,
    run,
)

from attngen.plan import Program
from attngen.plan.steps import (
    Advance,
    ForTiles,
    Release,
    When,
)
from attngen.simulate import SimulationFault

# name: (consumer, producer, who waits for what, the consumer mended); bodies of ForTiles, END left out.
DEADLOCKS: dict[str, tuple[Program, Program, str, Program]] = {
    "stage that one warpgroup does not release": (
        (FULL_Q, FULL_K, SCORES, LAND_S, *LAST_FREES, Advance(OURS.k), *2 * USE_K),
        (*LOAD_Q, *3 * LOAD_K),
        "producer waits for k[0] to be released, 1 of 2 have arrived; "
        "consumer 0 waits for k[0] to be filled, 0 of 1 have arrived; "
        "consumer 1 waits for k[0] to be filled, 0 of 1 have arrived",
        (FULL_Q, *3 * USE_K),
    ),
    "stage that nobody fills": (
        (FULL_Q, FULL_K, FULL_V),
        (*LOAD_Q, *LOAD_K),
        "consumer 0 waits for v[0] to be filled, 0 of 1 have arrived; "
        "consumer 1 waits for v[0] to be filled, 0 of 1 have arrived",
        (FULL_Q, FULL_K),
    ),
    "stage used again for want of an Advance": (
        (FULL_Q, FULL_K, SCORES, LAND_S, Release(OURS.k), *2 * USE_K),
        (*LOAD_Q, *3 * LOAD_K),
        "producer waits for k[0] to be released",
        (FULL_Q, *3 * USE_K),
    ),
    "turn that nobody gives at first": (
        (TAKE_TURN, PASS_TURN),
        (),
        "consumer 0 waits for its turn; consumer 1 waits for its turn",
        (FIRST_TURN, TAKE_TURN, PASS_TURN),
    ),
    "turn that is not passed on": (
        (FIRST_TURN, TAKE_TURN),
        (),
        "deadlock: consumer 1 waits for its turn of m_block 0",
        (FIRST_TURN, TAKE_TURN, PASS_TURN),
    ),
}


@pytest.mark.parametrize("name", DEADLOCKS)
def test_deadlock_says_who_waits_for_what(name: str) -> None:
    """Where no role can go on, each that is left is named with what it waits for, as it stands at the end."""
    consumer, producer, text, mended = DEADLOCKS[name]
    with pytest.raises(SimulationFault, match=re.escape(text)) as caught:
        run(programs((*consumer, *END), producer))
    assert caught.value.rule == "deadlock"
    run(programs((*mended, *END), producer))


def test_tile_counter_must_come_back_to_zero() -> None:
    """Blocks that draw once more than until no tile is left leave a counter that the next launch would start from."""
    consumer = (ForTiles((*END, *TAKE)),)
    run(warpgroup_plan(consumer, (ForTiles(DRAW),), persistent=True), 20)
    with pytest.raises(SimulationFault, match="stands at 2 at the end") as caught:
        run(warpgroup_plan(consumer, (ForTiles(DRAW), *DRAW), persistent=True), 20)
    assert caught.value.rule == "never reset"


@pytest.mark.parametrize("persistent", [False, True])
def test_launch_must_say_its_tiles(persistent: bool) -> None:
    """A launch that counts other tiles than its scheduler has is a fault, whoever works on them."""
    plan = programs((*END, *(TAKE if persistent else ())), DRAW if persistent else (), persistent)
    run(plan, 20)
    with pytest.raises(SimulationFault, match="for 4 tiles and has 5") as caught:
        run(call_of(plan, tiles=4), 20)
    assert caught.value.rule == "wrong grid"


def test_every_warpgroup_writes_its_rows() -> None:
    """Rows that one warpgroup leaves out are missed though the other has written its part of the block."""
    stores = When("last warpgroup", (STORE, STORED))
    with pytest.raises(SimulationFault, match="block 0 of out is not written once") as caught:
        run(programs((CLEAR_O, STAGE, FENCE, MEET, stores), ()))
    assert (caught.value.rule, caught.value.place) == ("never written", "out")
