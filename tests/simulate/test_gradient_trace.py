"""What the board shows of a backward pass is what the formulas say, worked out here in fp64."""

import torch

import attngen
from attngen.simulate import BackwardTrace, trace_backward

SPEC = {
    "target": "simulator",
    "problem": {"head_dim": {"qk": 3, "v": 2}},
    "precision": {"inputs": "f32"},
    "mask": "causal",
    "tile": {"block_m": 2, "block_n": 3},
    "gradients": ["q", "k", "v"],
}
ROWS, KEYS = 5, 7


def traced(score: str = "score") -> tuple[dict[str, torch.Tensor], BackwardTrace]:
    """dS of head 1 in fp64 with what it is made of, and the board."""
    kernel = attngen.compile(SPEC | {"score": score})
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(1, rows, heads, cols, generator=generator)
        for rows, heads, cols in ((ROWS, 2, 3), (KEYS, 1, 3), (KEYS, 1, 2), (ROWS, 2, 2))
    )
    out, lse = kernel(q, k, v, return_lse=True)
    board = trace_backward(kernel.call, dout, q, k, v, out, lse)
    q1, do1 = q[0, :, 1].double(), dout[0, :, 1].double()
    keys, values = k[0, :, 0].double(), v[0, :, 0].double()
    s = q1 @ keys.T / 3**0.5
    modified, slope = (s, torch.ones_like(s)) if score == "score" else (s.tanh(), 1 - s.tanh() ** 2)
    hidden = torch.ones(ROWS, KEYS).tril(KEYS - ROWS) == 0
    p = modified.masked_fill(hidden, -torch.inf).softmax(-1)
    dp, d = do1 @ values.T, (do1 * (p @ values)).sum(-1, keepdim=True)
    return {"P": p, "P times slope": p * slope, "dP": dp, "D": d, "dS": p * slope * (dp - d)}, board


def assert_board_is(expected: dict[str, torch.Tensor], board: BackwardTrace, *names: str) -> None:
    seen = 0
    for record in board.records:
        if record.member.head != 1 or record.rows is None or record.keys is None:
            continue
        rows, keys = (slice(span.start, span.stop) for span in (record.rows, record.keys))
        for name in names:
            part = expected[name][rows] if name == "D" else expected[name][rows, keys]
            torch.testing.assert_close(record.matrices[name].double(), part, rtol=1e-5, atol=1e-6)
        seen += 1
    assert (
        seen == 2 * 7
    )  # of 3 x 3 pairs causal shows seven, each to the owner of dQ and to that of dK and dV


def test_every_matrix_is_that_of_the_formulas() -> None:
    """P, dP, D and dS of each pair that the mask shows; each pair is met once for dQ and once for dK and dV."""
    assert_board_is(*traced(), "P", "dP", "D", "dS")


def test_a_modified_score_shows_its_slope() -> None:
    """P stands on the board times the slope of the score, and says so."""
    expected, board = traced("tanh(score)")
    assert_board_is(expected, board, "P times slope", "dP", "D", "dS")
    assert "P times slope" in str(board)


def test_gradients_grow_to_what_is_returned() -> None:
    """What is done last on the board is the gradient; before softmax_scale it is the last sum so far."""
    _, board = traced()
    for name, side in (("dQ", "rows"), ("dK", "keys"), ("dV", "keys")):
        done = [record for record in board.records if name in record.matrices]
        for record in done:
            own = getattr(record, side)
            whole = board.gradients[name.lower()][0, own.start : own.stop]
            assert torch.equal(record.matrices[name], whole[:, record.member.head])
        assert sum(len(getattr(record, side)) for record in done) == {"rows": 2 * ROWS, "keys": KEYS}[side]
        last = [record for record in board.records if f"{name} so far" in record.matrices][-1]
        scale = 1.0 if name == "dV" else 3**-0.5
        torch.testing.assert_close(scale * last.matrices[f"{name} so far"], done[-1].matrices[name])


def test_the_text_names_who_meets_whom() -> None:
    """Each pair has a line with head, queries and keys, and what is done says so."""
    text = str(traced()[1])
    for line in ("batch 0, head 1, rows 2 .. 3, keys 3 .. 5", "batch 0, head 1, rows 4, done"):
        assert f"{line}\n" in text
    assert "batch 0, head 0, keys 6, done" in text
