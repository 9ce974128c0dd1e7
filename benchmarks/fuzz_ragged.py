"""Random specs whose sequences have lengths of their own: `python benchmarks/fuzz_ragged.py --device cpu --cases 2000`.

Rows, one a seed, and their sums stand in OUT/fuzz_ragged.json; see `fuzz_counts.py`. Exit code 1 where there is a
fault, of an earlier run too.
"""

import sys

from fuzz_counts import count

if __name__ == "__main__":
    sys.exit(count("fuzz_ragged.json", __doc__, is_cut=True))
