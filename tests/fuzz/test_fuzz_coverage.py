"""What a seeded run meets, and that attngen's own plans pass it."""

import math
from collections import Counter

import pytest
from program_coverage import expected, met_in_program

from attngen.check.inputs import Shape
from attngen.fuzz import search_faults
from attngen.fuzz.case import Case
from attngen.fuzz.coverage import Coverage, Met
from attngen.fuzz.properties import PropertyFailure, check
from attngen.fuzz.search_faults import fuzz
from attngen.fuzz.strategies import plan_of
from attngen.fuzz.trial import Make
from attngen.spec import load
from tests.effort import examples, profile

TARGETS = ("simulator", *(pytest.param(arch, marks=pytest.mark.exhaustive) for arch in ("sm_80", "sm_90a")))
SEED = 2
SEEDS = {"simulator": 65, "sm_90a": 26}
"""From which four runs meet everything, of Hypothesis 6's draws when this was written; elsewhere it may take more."""
EXAMPLES = examples(5)
"""Cases of a run."""
RUNS = 15
"""At most, of one seed after another: draws of a seed part now and then (docs/design/fuzz.md) and may miss some."""
TRIED = math.inf if profile() == "large" else 1
"""Cases that must hold their property for each value of each dimension; the others are drawn and counted alone."""
KNOBS = ("schedule", "warpgroups", "overlap", "persistent", "order", "tiles per block")


class FewOfEach:
    """Checks a case that shows what too few checked ones have shown, and all once one has failed."""

    def __init__(self) -> None:
        self.checked: Counter[Met] = Counter()
        self.has_failed = False

    def __call__(self, case: Case, make: Make, device: str) -> None:
        plan = plan_of(case.spec)
        assert plan is not None
        met = set(met_in_program(case, plan))
        if self.has_failed or any(self.checked[each] < TRIED for each in met):
            self.checked.update(met)
            try:
                check(case, make, device)
            except PropertyFailure:
                self.has_failed = True
                raise


@pytest.mark.hypothesis  # it is one, of `fuzz`: a large run checks every case
@pytest.mark.parametrize("target", TARGETS)
def test_seeded_runs_meet_everything_and_hold_every_property(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every schedule, dtype, head_dim, length class, group, stride, property, and every range empty and not.

    No case breaks its property, and as many are drawn as were asked for. If something is missing, a run follows.
    """
    monkeypatch.setattr(search_faults, "check", FewOfEach())
    every: Counter[Met] = Counter()
    first = SEEDS.get(target, SEED)
    for seed in range(first, first + RUNS):
        report = fuzz(examples=EXAMPLES, seed=seed, targets=(target,), meets=met_in_program)
        assert report.ok, report
        assert report.examples == EXAMPLES
        every += report.coverage.counts
        if all(every[met] for met in expected((target,))):
            break
    assert [met for met in expected((target,)) if not every[met]] == []


def test_the_table_names_what_was_met() -> None:
    """Each dimension that was met is a line of the table, with its counts."""
    report = fuzz(examples=30, seed=SEED, targets=("simulator",))
    table = report.coverage.table()
    dimensions = list(table.columns[0].cells)
    assert dimensions[:3] == ["target", "schedule", "dtype"] and len({*dimensions}) == len(dimensions)
    assert {*dimensions} == {dimension for dimension, _ in report.coverage.counts}
    schedules = f"[bold]fa2[/] {report.coverage.counts['schedule', 'fa2']}"
    assert str(list(table.columns[1].cells)[1]).startswith(schedules)


def covered(kind: str, mask: str, seqlen_q: int, seqlen_k: int) -> set[tuple[str, str]]:
    """What one case with tiles of 4 rows and 2 keys meets."""
    spec = load(
        {
            "target": "simulator",
            "problem": {"head_dim": 2},
            "mask": mask,
            "tile": {"block_m": 4, "block_n": 2},
            "schedule": {"kind": kind},
        }
    )
    plan = plan_of(spec)
    assert plan is not None
    coverage = Coverage(met_in_program)
    coverage.add(Case(spec, Shape(1, 2, 1, seqlen_q, seqlen_k)), plan)
    return set(coverage.counts)


def test_ranges_and_blocks_per_row_are_counted_by_hand() -> None:
    """Causal, 4 rows and 3 keys: the rows see 2 blocks, the right range runs, no block is full, nor is a row empty."""
    met = covered("fa2", "causal", 4, 3)
    ours = {met_ for met_ in met if met_[0] in ("blocks per row", "range")}
    assert ours == {("blocks per row", "2"), ("range", "fa2 right filled"), ("range", "fa2 full empty")}


def test_blocks_without_keys_are_counted() -> None:
    """Causal, 8 rows and 2 keys: the first 4 rows see nothing, the last block of rows sees one block."""
    met = covered("fa2", "causal", 8, 2)
    assert {("blocks per row", "0"), ("blocks per row", "1")} <= met
    assert {("condition", "tile has blocks: no"), ("condition", "tile has blocks: yes")} <= met
    assert ("blocks per row", "2") not in met


def test_lengths_beside_a_multiple_are_counted() -> None:
    """9 keys are one more than a multiple of 8 and than one of the block of 2, and are no multiple."""
    met = {value for axis, value in covered("serial", "full", 1, 9) if axis == "seqlen_k"}
    assert met == {"8 + 1", "block + 1", "block - 1"}


def test_knobs_of_warpgroups_are_counted() -> None:
    """Three warpgroups, no overlap; 20 rows in tiles of 6, so that the two simulated blocks have four tiles."""
    spec = load(
        {
            "target": "simulator",
            "problem": {"head_dim": 2},
            "tile": {"block_m": 6, "block_n": 2},
            "schedule": {"kind": "pingpong", "warpgroups": 3, "overlap": False, "order": "rows"},
        }
    )
    plan = plan_of(spec)
    assert plan is not None
    for rows, per_block in ((20, "many"), (12, "1")):
        coverage = Coverage(met_in_program)
        coverage.add(Case(spec, Shape(1, 2, 1, rows, 3)), plan)
        found = {met for met in coverage.counts if met[0] in KNOBS}
        values = ("pingpong", "3", "no", "yes", "rows", per_block)
        assert found == set(zip(KNOBS, values, strict=True))
