"""The prelude, definition by definition, against tables drawn by hand and values of its sources."""

import math

import pytest
import torch

from attngen.expr import (
    Declarations,
    Expr,
    Scalar,
    TensorType,
    definitions,
    evaluate,
    parse_mask,
    parse_score,
    prelude,
)

DECLARATIONS = Declarations(
    scalars={"cap": Scalar("cap", "f32"), "width": Scalar("width", "i32")},
    tensors={
        "ids": TensorType("ids", "i32", ("batch", "seqlen_k")),
        "slopes": TensorType("slopes", "f32", ("num_heads_q",)),
        "table": TensorType("table", "f32", (32, "num_heads_q")),
    },
)


def draw(mask: Expr, rows: int, keys: int, ids: list[int] | None = None) -> list[str]:
    """The table of a mask; rows are queries, columns are keys."""
    env: dict[str, int | torch.Tensor] = {
        "b": 0,
        "q_idx": torch.arange(rows)[:, None],
        "kv_idx": torch.arange(keys)[None, :],
        "seqlen_q": rows,
        "seqlen_k": keys,
        "width": 2,
    }
    tensors = {"ids": torch.tensor([ids or [0] * keys], dtype=torch.int32)}
    seen = torch.as_tensor(evaluate(mask, env, tensors)).expand(rows, keys)
    return ["".join(".#"[int(pair)] for pair in row) for row in seen.tolist()]


TABLES = [
    ("full", None, ["#####", "#####", "#####"]),
    ("full", None, ["###", "###", "###", "###", "###"]),
    ("causal", None, ["###..", "####.", "#####"]),
    ("causal", None, ["...", "...", "#..", "##.", "###"]),
    ("causal", None, ["#"]),
    ("causal", None, ["######"]),
    ("causal", None, [".", ".", "#"]),
    ("causal_top_left", None, ["#....", "##...", "###.."]),
    ("causal_top_left", None, ["#.", "##", "##", "##"]),
    ("window(1, 0)", None, [".##..", "..##.", "...##"]),
    ("window(0, 2)", None, ["..###", "...##", "....#"]),
    ("window(1, 1)", None, ["...", "#..", "##.", "###", ".##"]),
    ("window(width, 0)", None, ["###...", ".###..", "..###.", "...###"]),
    ("sinks(2)", None, ["##...", "##...", "##..."]),
    ("causal and (window(1, 0) or sinks(1))", None, ["###...", "#.##..", "#..##.", "#...##"]),
    ("prefix(2)", None, ["##", "##", "##", "##"]),
    ("prefix(3)", None, ["###..", "###..", "####.", "#####"]),
    ("document(ids)", [7, 7, 3, 3, 3], ["..###", "..###", "..###"]),
    ("document(ids)", [1, 1, 2, 2, 1], ["##..#", "##..#", "..##.", "..##.", "##..#"]),
    ("document(ids) and causal", [1, 1, 2, 2, 2], ["..#..", "..##.", "..###"]),
    ("shared_prefix(ids)", [0, 0, 1, 1, 2], ["####.", "####.", "##..#"]),
    ("shared_prefix(ids)", [0, 1, 2], ["#..", "##.", "#.#"]),
    ("dilated(2)", None, ["#.#.#", ".#.#.", "#.#.#"]),
    ("dilated(3)", None, [".#.", "..#", "#..", ".#.", "..#"]),
    ("causal and dilated(2)", None, ["#.#..", ".#.#.", "#.#.#"]),
    ("chunked(2)", None, ["..##..", "..##..", "....##", "....##"]),
    ("chunked(3)", None, ["###..", "...##", "...##"]),
    ("neighbourhood(3, 1)", None, ["##.##.", "######", ".##.##", "##.##.", "######", ".##.##"]),
    ("neighbourhood(2, 1)", None, ["######", "..####", "..####"]),
    (
        "block_diffusion(4, 2)",
        None,
        ["##......", "##......", "..####..", "..####..", "....##..", "....##..", "....####", "....####"],
    ),
    ("block_diffusion(3, 2)", None, ["##....", "##....", "..###.", "...##.", "...##.", "...###"]),
    ("block_diffusion(2, 1)", None, [".##.", "..#.", "..##"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("mask", "ids", "table"),
    TABLES,
    ids=[f"{mask}-{len(table)}x{len(table[0])}" for mask, _, table in TABLES],
)
def test_masks_by_tables_drawn_by_hand(mask: str, ids: list[int] | None, table: list[str]) -> None:
    """The last query stands beside the last key, whichever length is larger."""
    assert draw(parse_mask(mask, DECLARATIONS), len(table), len(table[0]), ids) == table


def test_every_definition_of_the_prelude_has_a_table_or_a_value() -> None:
    """What is drawn nowhere is not done, and what is drawn is drawn with more keys than queries too."""
    scores = {"q_pos", "alibi", "softcap", "relative_bias", "temperature"}
    drawn = {name for name in prelude() if any(name in mask for mask, _, _ in TABLES)}
    assert drawn | scores == prelude().keys() and not drawn & scores
    for name in drawn:
        assert any(name in mask and len(table) != len(table[0]) for mask, _, table in TABLES), name
    assert definitions().keys() == {name for name, each in prelude().items() if not each.parameters}


def value(text: str, **env: float) -> float:
    tensors = {
        "slopes": torch.tensor([0.5, 0.25]),
        "table": torch.arange(32.0)[:, None] + torch.tensor([0.0, 100.0]),
    }
    found = evaluate(parse_score(text, DECLARATIONS), env, tensors)  # type: ignore[arg-type]
    return float(found)


def test_the_place_of_a_query_counts_from_the_end() -> None:
    """The last of 3 queries stands beside the last of 5 keys, the first of 5 before the first of 3."""
    assert value("q_pos", q_idx=2, seqlen_q=3, seqlen_k=5) == 4
    assert value("q_pos", q_idx=0, seqlen_q=5, seqlen_k=3) == -2


def test_alibi_falls_with_the_distance() -> None:
    """0 at the query's own place, minus a slope for each key before it."""
    at = {"q_idx": 2, "seqlen_q": 3, "seqlen_k": 5}
    assert value("alibi(slopes)", h=0, kv_idx=4, **at) == 0
    assert value("alibi(slopes)", h=0, kv_idx=1, **at) == -1.5
    assert value("alibi(slopes)", h=1, kv_idx=0, **at) == -1.0


def test_softcap_bends_and_bounds() -> None:
    """cap · tanh(x / cap), as Gemma 2 has it."""
    assert value("softcap(score, cap)", score=0.0, cap=30.0) == 0
    assert value("softcap(score, cap)", score=15.0, cap=30.0) == pytest.approx(13.8635, abs=1e-4)
    assert value("softcap(score, cap)", score=-1e6, cap=30.0) == -30


def test_temperature_steps_by_the_period() -> None:
    """1 in the first period, then 1 + scale · log of one more than the number of periods passed."""
    at = {"seqlen_q": 100, "seqlen_k": 100}
    found = [value("temperature(0.1, 8)", q_idx=place, **at) for place in (0, 7, 8, 15, 16, 99)]
    expected = [1 + 0.1 * math.log(periods) for periods in (1, 1, 2, 2, 3, 13)]
    assert found == pytest.approx(expected, abs=1e-6)
    assert value("temperature(0.1, 8)", q_idx=0, seqlen_q=100, seqlen_k=50) == 1


def bucket_of_t5(distance: int) -> int:
    """As `_relative_position_bucket` of T5 has it for the encoder: 32 buckets, max_distance 128."""
    bucket, n = (16 if distance > 0 else 0), abs(distance)
    if n < 8:
        return bucket + n
    return bucket + min(15, 8 + int(math.log(n / 8) / math.log(128 / 8) * 8))


def bucket_of_decoder(distance: int) -> int:
    """The buckets of T5's decoder, `bidirectional=False`: all 32 for the past."""
    n = max(-distance, 0)
    return n if n < 16 else min(31, 16 + int(math.log(n / 16) / math.log(128 / 16) * 16))


def test_relative_bias_has_the_buckets_of_t5() -> None:
    """For every distance up to 300 to both sides but the steps that f32 and f64 round to different sides."""
    for distance in range(-300, 301):
        steps = math.log(max(abs(distance), 8) / 8) / math.log(16) * 8
        if abs(steps - round(steps)) < 1e-5 and abs(distance) > 8:
            continue  # 16, 32, 64: log2 of a power of two, where f32 may fall short of the whole number
        at = {"q_idx": 400, "kv_idx": 400 + distance, "seqlen_q": 1000, "seqlen_k": 1000}
        assert value("relative_bias(table, 32, 128)", h=0, **at) == bucket_of_t5(distance), distance
        assert value("relative_bias(table, 32, 128)", h=1, **at) == 100 + bucket_of_t5(distance)


def test_relative_bias_of_the_decoder_has_all_buckets_for_the_past() -> None:
    """`false` takes the first bucket for every key behind the query; `true` is what a call without it is."""
    for distance in (*range(-300, 10), 300):
        at = {"q_idx": 400, "kv_idx": 400 + distance, "seqlen_q": 1000, "seqlen_k": 1000}
        assert value("relative_bias(table, 32, 128, false)", h=1, **at) == 100 + bucket_of_decoder(distance)
    encoder, same = (
        parse_score(f"score + relative_bias(table, 32, 128{last})", DECLARATIONS) for last in ("", ", true")
    )
    assert encoder is same
