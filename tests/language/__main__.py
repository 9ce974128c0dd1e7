"""Try random expressions: `python -m tests.language [N] [--device cuda]`.

On the CPU ranges and classes of tiles are held against all pairs; on a GPU also values bit by bit, classes and tables
against the simulator's, and the largest error of every function is told. Exit code 1 where something is wrong.
"""

import argparse
import sys

from attngen.fuzz.search_faults import targets_for
from tests.language.language import EXPRESSIONS, fuzz_language


def main() -> int:
    """Read the command line, try, and print the report."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.language",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("expressions", nargs="?", type=int, default=EXPRESSIONS, metavar="N")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--arch", help="target whose text a GPU runs; its own unless told")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    given = parser.parse_args()
    target = "" if given.device == "cpu" else targets_for(given.device, given.arch)[0]
    report = fuzz_language(given.expressions, given.device, given.seed, target)
    print(report)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
