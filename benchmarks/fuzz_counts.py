"""Random specs of one kind, so many in all: what the scripts that count them have in common.

A seed after another, `--examples` cases each; what a seed gave is a row of the file before the next one begins, so that
a run that was stopped goes on where it was: cases of earlier runs on the device count. A fault is kept as the command
that repeats it. `--minutes` lets no seed begin after that time.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from attngen.check import timing
from attngen.fuzz.search_faults import fuzz

Row = dict[str, Any]


def rows_in(path: Path) -> list[Row]:
    """What earlier runs have found."""
    return list(json.loads(path.read_text(encoding="utf-8"))["rows"]) if path.exists() else []


def tried(seed: int, examples: int, device: str, name: str, **kind: bool) -> Row:
    """The row of a seed; `kind` says what is drawn, as of `fuzz`."""
    report = fuzz(examples=examples, seed=seed, device=device, **kind)
    return {
        "device": name,
        "seed": seed,
        "cases": report.examples,
        "fault": None if report.ok else report.repro,
        "seconds": round(report.seconds, 1),
        "commit": timing.machine()["commit"],
    }


def summary(rows: list[Row]) -> dict[str, Row]:
    """Cases, first and last seed, and faults, by device."""
    of_device = {name: [row for row in rows if row["device"] == name] for name in {r["device"] for r in rows}}
    return {
        name: {
            "cases": sum(row["cases"] for row in own),
            "seeds": [min(row["seed"] for row in own), max(row["seed"] for row in own)],
            "faults": sum(row["fault"] is not None for row in own),
            "commits": sorted({row["commit"] for row in own}),
        }
        for name, own in sorted(of_device.items())
    }


def write(path: Path, rows: list[Row]) -> None:
    """Write all rows in the place of what was there; whoever is stopped meanwhile leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"summary": summary(rows), "rows": rows}, indent=1) + "\n"
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def count(file: str, about: str | None, **kind: bool) -> int:
    """Go on until there are as many cases as the command line asks for; the exit code: 1 where there is a fault.

    Args:
        file: name of the file of rows.
        about: what the script says of itself.
        **kind: what is drawn, as of `fuzz`.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    name = torch.cuda.get_device_name() if given.device == "cuda" else "simulator"
    path, began = given.out / file, time.monotonic()
    rows = rows_in(path)
    while time.monotonic() - began < 60 * given.minutes:
        own = [row for row in rows if row["device"] == name]
        missing = given.cases - sum(row["cases"] for row in own)
        if missing <= 0:
            break
        seed = 1 + max((row["seed"] for row in own), default=0)
        rows.append(tried(seed, min(given.examples, missing), given.device, name, **kind))
        write(path, rows)
        print(rows[-1], flush=True)
    print(json.dumps(summary(rows), indent=1))
    return int(any(row["fault"] for row in rows if row["device"] == name))
