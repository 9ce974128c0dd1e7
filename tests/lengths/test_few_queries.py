"""Which calls of few queries have their keys cut, and for which tiles; on tensors that have no memory."""

import re

import pytest
import torch

from attngen.few_queries import ASKING_FOR_HEADS, cut_into, tile_of_few
from attngen.plan import Lengths
from attngen.resources import data_dir
from attngen.spec import load

PAGED = Lengths("dense", "paged")


def rows(
    requests: int,
    queries: int,
    keys: int,
    heads: tuple[int, int] = (32, 8),
    head_dim: int = 128,
    page: int = 64,
    score: str = "score",
    has_warpgroups: bool = True,
    **passed: object,
) -> int:
    """Of a tile, for a call on pages."""
    of = {"dtype": torch.bfloat16, "device": "meta"}
    q = torch.empty(requests, queries, heads[0], head_dim, **of)
    k = torch.empty(1, page, heads[1], head_dim, **of)
    table = torch.empty(requests, -(-keys // page), dtype=torch.int32, device="meta")
    named = {"block_table": table, **passed}
    return tile_of_few(q, k, k, ("causal", score), PAGED, named, has_warpgroups)


@pytest.mark.parametrize(
    ("tile", "call"),
    [
        (16, {"requests": 1, "queries": 1, "keys": 4096}),
        (16, {"requests": 64, "queries": 4, "keys": 4096}),
        (0, {"requests": 1, "queries": 1, "keys": 500, "page": 4}),
        (64, {"requests": 1, "queries": 8, "keys": 4096}),
        (64, {"requests": 64, "queries": 16, "keys": 4096}),
        (64, {"requests": 8, "queries": 32, "keys": 1024}),  # two tiles of what an L2 holds
        (128, {"requests": 8, "queries": 32, "keys": 8192}),
        (64, {"requests": 8, "queries": 32, "keys": 8192, "heads": (16, 8), "head_dim": 256}),
        (128, {"requests": 64, "queries": 64, "keys": 4096}),
        (0, {"requests": 64, "queries": 96, "keys": 4096}),  # a head's rows fill a tile, and tiles the GPU
        (128, {"requests": 1, "queries": 256, "keys": 32768}),  # which these do not
        (0, {"requests": 1, "queries": 512, "keys": 32768}),
        (0, {"requests": 1, "queries": 128, "keys": 960}),
        (64, {"requests": 1, "queries": 32, "keys": 32768, "heads": (32, 32)}),
        (0, {"requests": 8, "queries": 32, "keys": 4096, "heads": (32, 32)}),
        (64, {"requests": 1, "queries": 32, "keys": 32768, "score": "score + alibi(slopes)"}),
        (0, {"requests": 8, "queries": 32, "keys": 8192, "score": "score * scales[h]"}),
    ],
    ids=str,
)
def test_tiles_are_those_that_were_fastest(tile: int, call: dict[str, object]) -> None:
    """Figures: docs/performance.md, "A few queries and long caches"."""
    assert rows(**call) == tile  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "more", [{"page": 12}, {"leftpad_k": torch.zeros(8)}, {"has_warpgroups": False}], ids=str
)
def test_warps_copy_what_the_copy_engine_does_not(more: dict[str, object]) -> None:
    """Up to 32 rows, by tiles of them where an L2 does not hold the keys."""
    found = [rows(8, queries, 8192, **more) for queries in (4, 8, 9)]  # type: ignore[arg-type]
    assert found == [16, 32, 0]
    assert rows(1, 8, 2048, **more) == 16  # type: ignore[arg-type]


@pytest.mark.parametrize("tile", [0, 16, 32, 64, 128])
def test_a_tile_is_a_spec(tile: int) -> None:
    spec = load({"problem": {"head_dim": 64, "keys": "paged"}, **cut_into(tile)})
    assert (spec.split != "none") == bool(tile)
    assert spec.tile.block_m == (tile if tile > 16 else "auto")


def test_definitions_of_the_prelude_that_read_a_head_are_known() -> None:
    """Their rows are not those of a group."""
    definitions = re.findall(
        r"^(\w+)(?:\([^=]*\))? = (.*)$", (data_dir("expr") / "prelude.attn").read_text(), re.M
    )
    reading = {name for name, text in definitions if re.search(r"\bh\b", text)}
    assert reading and all(ASKING_FOR_HEADS.search(name) for name in reading)
    assert not any(ASKING_FOR_HEADS.search(name) for name, _ in definitions if name not in reading)
