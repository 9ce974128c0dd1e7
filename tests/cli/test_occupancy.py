"""How many blocks a multiprocessor holds."""

import pytest

from attngen.arch import ARCHS
from attngen.cli.occupancy import occupancy


@pytest.mark.parametrize(
    ("threads", "registers", "smem", "blocks", "limit"),
    [
        (128, 128, 0, 4, "registers"),  # 65536 / (128 * 128)
        (128, 121, 0, 4, "registers"),  # 121 is granted as 128
        (128, 32, 64 * 1024, 3, "shared memory"),  # 228 KiB holds three of 65 KiB
        (1024, 16, 0, 2, "threads"),  # 2048 threads
        (384, 168, 0, 1, "registers"),  # two consumers and a producer: 64512 of 65536
        (512, 128, 0, 1, "registers"),  # three and a producer: all of them
        (
            160,
            200,
            0,
            1,
            "registers",
        ),  # each quarter of the multiprocessor holds two warps of 6400, a block has five
    ],
)
def test_occupancy_on_hopper(threads: int, registers: int, smem: int, blocks: int, limit: str) -> None:
    """Resident blocks of an sm_90a multiprocessor, worked out by hand."""
    found = occupancy(ARCHS["sm_90a"], threads, registers, smem)
    assert found.blocks == blocks
    assert found.warps == blocks * threads // 32
    assert found.limited_by == limit
