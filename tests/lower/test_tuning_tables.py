"""The tables behind `auto`: files that are read strictly, and evidence that is there."""

import importlib.util
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest

import attngen
from attngen.arch import ARCHS
from attngen.errors import InternalError
from attngen.lower import Features, lower
from attngen.lower.table import read_table, table
from attngen.resources import data_dir

ROOT = Path(__file__).resolve().parents[2]
TUNE = ROOT / "benchmarks" / "tune.py"
TABLES = tuple(sorted(path.stem for path in data_dir("lower/tables").glob("*.yaml")))
MASKS = ("full", "causal", "window(128, 0)", "chunked(64)", "document(ids)")
SCORES = (
    "score",
    "softcap(score, 30.0)",
    "score + alibi(slopes)",
    "score / (1.0 + abs(score))",
    "score + bias[h, q_idx, kv_idx]",
    "exp(score + bias[h, q_idx, kv_idx])",
)
TENSORS = {
    "slopes": "f32[num_heads_q]",
    "ids": "i32[batch, seqlen_k]",
    "bias": "bf16[num_heads_q, seqlen_q, seqlen_k]",
}


@pytest.fixture(scope="module")
def tune() -> ModuleType:
    """The script that measures the tables' rows, as a module."""
    spec = importlib.util.spec_from_file_location("tune", TUNE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["tune"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", TABLES)
def test_every_case_names_evidence_that_exists(name: str, tune: ModuleType) -> None:
    """The script knows the set and the result is a file, or the case says why nothing was measured."""
    for case in table(name):
        if case.script:
            script, of = case.script.split()
            assert (ROOT / script) == TUNE and of in tune.SETS, case
        assert case.why or (ROOT / "benchmarks" / "results" / case.result).is_file(), case


def test_every_case_counts_for_some_spec() -> None:
    """No case is hidden behind those above it."""
    met: dict[str, set[int]] = {name: set() for name in TABLES}
    dims = (64, 80, 96, 112, 128, {"qk": 192, "v": 128}, {"qk": 128, "v": 64}, 192, 256)
    eight_bits = [
        {"inputs": "e4m3", "scales": scales, "promote": promote}
        for scales in ("per_head", "per_block", "per_token")
        for promote in (0, 1)
    ]
    cases = product(("sm_90a",), dims, MASKS, SCORES, ({}, *eight_bits), ("none",))
    others = (
        *(("simulator", 64, "full", "score", {}, split) for split in ("none", "auto")),
        *(
            ("sm_90a", dim, mask, "score", {}, "auto")
            for dim in (64, 128, 256)
            for mask in ("full", "document(ids)")
        ),
        *(
            ("sm_90a", dim, mask, "score", {"cache": "e4m3", "scales": scales}, split)
            for dim in (64, 128, 256)
            for mask in ("full", "window(9, 0)")
            for scales in ("per_head", "per_token")
            for split in ("none", "auto")
        ),
    )
    for target, dim, mask, score, precision, split in (*others, *cases):
        text = mask + score
        document = {
            "problem": {"head_dim": dim},
            "mask": mask,
            "score": score,
            "precision": precision,
            "split": split,
            "tensors": {name: kind for name, kind in TENSORS.items() if name in text},
        }
        if isinstance(dim, int) and precision and dim % 16:
            continue
        features = Features.of(attngen.load(document), ARCHS[target])
        names = ("fa2", "serial", "warpgroups") if features.scales is None else ("warpgroups_8bit",)
        for name in names:
            met[name].add(next(i for i, case in enumerate(table(name)) if case.holds(features)))
    assert met == {name: set(range(len(table(name)))) for name in TABLES}


GOOD = """
cases:
  - when: {head_dim: [1, 64]}
    rows:
      - {schedule: pingpong, block_m: 128, block_n: 64, stages: 2, warpgroups: 2}
    script: benchmarks/tune.py warpgroups
    result: tune_warpgroups.json
"""


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("head_dim:", "head_dims:"),
        ("block_n: 64", "block_k: 64"),
        (", stages: 2", ""),
        ("pingpong", "pingpang"),
        ("    script: benchmarks/tune.py warpgroups\n", ""),
        ("result:", "why: it is good\n    result:"),
        ("warpgroups: 2}", "warpgroups: 2, part_cols: third}"),
        ("rows:", "row:"),
        ("cases:", "- cases:"),
    ],
)
def test_a_table_is_read_strictly(right: str, wrong: str, tmp_path: Path) -> None:
    """A name that nothing has, or evidence that is missing, is a fault of attngen's own, and names the file."""
    path = tmp_path / "some.yaml"
    path.write_text(GOOD, encoding="utf-8")
    assert len(read_table(path)) == 1
    path.write_text(GOOD.replace(right, wrong), encoding="utf-8")
    with pytest.raises(InternalError, match="some.yaml"):
        read_table(path)


def test_the_script_has_candidates_for_every_set(tune: ModuleType) -> None:
    """For each spec the table's own rows come first, and something else is tried beside them."""
    for name, of in tune.SETS.items():
        spec = next(of.loaded())
        found = tune.candidates(spec, of.varied)
        assert len(found) > 3, name
        schedule, _ = next(iter(found.values()))
        assert schedule in [plan.schedule for plan in lower(spec, tune.ARCH).programs], name


def test_the_script_prints_a_case_that_a_table_takes(tune: ModuleType, tmp_path: Path) -> None:
    """Winners of neighbouring lengths are one row, the last for any length, and the file is read as it is printed."""
    of = tune.SETS["8bit"]
    spec = next(spec for spec in of.loaded() if spec.precision.promote == 1 and spec.mask == "causal")
    found = tune.candidates(spec, of.varied)
    first, second, *_ = found
    measured = [
        {"seqlen": length, "ms": {name: [2.0 - (name == winner), 9.0, 1.0] for name in found}}
        for length, winner in ((1024, first), (4096, first), (16384, second))
    ]
    path = tmp_path / "printed.yaml"
    path.write_text("cases:\n" + tune.case(spec, "8bit", found, measured) + "\n", encoding="utf-8")
    (case,) = read_table(path)
    assert case.holds(Features.of(spec, tune.ARCH)) and case.script == "benchmarks/tune.py 8bit"
    assert [row.get("up_to") for row in case.rows] == [4096, None]
    assert case.rows[0]["part_cols"] in ("whole", "half", "quarter")


def test_a_dry_run_compiles_candidates() -> None:
    """Without a GPU the script lists what it would time, compiled."""
    command = [sys.executable, str(TUNE), "fa2", "--dry-run", "--most", "1", "--head-dims", "64"]
    told = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert told.count("1 candidates") == 2 and told.count("fa2 128x64x2/4") == 2
