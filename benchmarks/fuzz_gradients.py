"""Random specs with gradients: `python benchmarks/fuzz_gradients.py --device cpu --cases 2000`.

Rows, one a seed, and their sums stand in OUT/fuzz_gradients.json; see `fuzz_counts.py`. Exit code 1 where there is a
fault, of an earlier run too.
"""

import sys

from fuzz_counts import count

if __name__ == "__main__":
    sys.exit(count("fuzz_gradients.json", __doc__, backward=True))
