"""What is said of expressions without running them: ranges hold every value, tiles are what they are called."""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import seed as with_seed
from hypothesis import strategies as st

from attngen.errors import AttngenError, ExpressionError
from attngen.expr import Expr, evaluate, fill_tables, index_range, nodes, parse_mask, tile_classes
from attngen.fuzz.draw_expressions import DECLARATIONS, masks
from tests.language.declared import random_scalars, random_tensors

BATCH, HEADS, HEADS_KV = 2, 4, 2
MOST_ROWS = 24
MOST_BLOCK = 8


@dataclass(frozen=True)
class Problem:
    """Sizes, tiles, and the seed of what the declarations of `expressions.DECLARATIONS` hold."""

    seqlen_q: int
    seqlen_k: int
    block_m: int
    block_n: int
    seed: int

    @property
    def sizes(self) -> dict[str, int]:
        """Of the call."""
        heads = {"batch": BATCH, "num_heads_q": HEADS, "num_heads_kv": HEADS_KV}
        return heads | {"seqlen_q": self.seqlen_q, "seqlen_k": self.seqlen_k}


class ClassFailure(AttngenError):
    """A range without a value of its expression, or a tile that is called what it is not.

    Attributes:
        text: of the mask.
        problem: where.
    """

    def __init__(self, text: str, problem: Problem, complaint: str) -> None:
        super().__init__(f"{complaint}\nmask: {text}\nfor {problem}")
        self.text = text
        self.problem = problem


_PROBLEMS = st.builds(
    Problem,
    st.integers(1, MOST_ROWS),
    st.integers(1, MOST_ROWS),
    st.integers(1, MOST_BLOCK),
    st.integers(1, MOST_BLOCK),
    st.integers(0, 2**16),
)


def fuzz_classes(examples: int, seed: int = 0) -> ClassFailure | None:
    """Try random masks over random declarations, shapes and tiles; the smallest failure, or None."""

    @with_seed(seed)
    @settings(
        max_examples=examples,
        phases=(Phase.generate, Phase.shrink),
        database=None,
        deadline=None,
        verbosity=Verbosity.quiet,
        report_multiple_bugs=False,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(masks(DECLARATIONS), _PROBLEMS)
    def search(text: str, problem: Problem) -> None:
        check_classes(text, problem)

    try:
        search()
    except ClassFailure as failure:
        return failure
    return None


def check_classes(text: str, problem: Problem) -> None:
    """Compare what is said of a mask with all of its pairs.

    Raises:
        ClassFailure: something that is said does not hold.
    """
    try:
        mask = parse_mask(text, DECLARATIONS)
    except ExpressionError:
        return  # its range may exceed what the language takes
    generator = torch.Generator().manual_seed(problem.seed)
    tensors = random_tensors(DECLARATIONS, problem.sizes, generator, is_wild=problem.seed % 2 == 1)
    scalars = random_scalars(DECLARATIONS, generator)
    complaint = _range_complaint(mask, problem, scalars, tensors) or _tile_complaint(
        mask, problem, scalars, tensors
    )
    if complaint is not None:
        raise ClassFailure(text, problem, complaint)


Tensors = dict[str, torch.Tensor]


def _range_complaint(mask: Expr, problem: Problem, scalars: dict[str, Any], tensors: Tensors) -> str | None:
    env = _pairs(problem, scalars)
    for each in nodes(mask):
        if each.type == "i32":
            found = torch.as_tensor(evaluate(each, env, tensors))
            (lowest, highest), least, greatest = index_range(each), int(found.min()), int(found.max())
            if least < lowest or greatest > highest:
                return f"{each} is said to lie in {lowest} .. {highest}, and reaches {least} and {greatest}"
    return None


def _tile_complaint(mask: Expr, problem: Problem, scalars: dict[str, Any], tensors: Tensors) -> str | None:
    classes = tile_classes(mask)
    blocks = (problem.block_m, problem.block_n)
    tables = fill_tables(classes.tables, problem.sizes, scalars, tensors, *blocks)
    env = _tiles(problem, scalars)
    shape = (BATCH, HEADS, env["q_idx.tile"].shape[2], env["kv_idx.tile"].shape[3])
    may, must = (
        torch.as_tensor(evaluate(tree, env, tensors | tables)).expand(shape)
        for tree in (classes.may, classes.must)
    )
    pairs = (BATCH, HEADS, problem.seqlen_q, problem.seqlen_k)
    visible = torch.as_tensor(evaluate(mask, _pairs(problem, scalars), tensors)).expand(pairs)

    def tiled(value: bool) -> torch.Tensor:
        padding = (0, -problem.seqlen_k % problem.block_n, 0, -problem.seqlen_q % problem.block_m)
        padded = torch.nn.functional.pad(visible, padding, value=value)
        blocks = (padded.shape[2] // problem.block_m, padded.shape[3] // problem.block_n)
        return padded.reshape(BATCH, HEADS, blocks[0], problem.block_m, blocks[1], problem.block_n)

    for word, wrong in (
        ("empty", tiled(False).any(5).any(3) & ~may),
        ("full", must & ~tiled(True).all(5).all(3)),
    ):
        if bool(wrong.any()):
            b, h, m, n = wrong.nonzero()[0].tolist()
            return f"tile ({m}, {n}) of head {h} of batch {b} is called {word} and is not"
    return None


def _heads(scalars: dict[str, Any], problem: Problem) -> dict[str, Any]:
    head = torch.arange(HEADS).view(1, -1, 1, 1)
    lengths = {"seqlen_q": problem.seqlen_q, "seqlen_k": problem.seqlen_k}
    batch = torch.arange(BATCH).view(-1, 1, 1, 1)
    return {**scalars, **lengths, "b": batch, "h": head, "h_kv": head // (HEADS // HEADS_KV)}


def _pairs(problem: Problem, scalars: dict[str, Any]) -> dict[str, Any]:
    """All pairs of all heads."""
    rows, keys = (
        torch.arange(problem.seqlen_q).view(1, 1, -1, 1),
        torch.arange(problem.seqlen_k).view(1, 1, 1, -1),
    )
    return _heads(scalars, problem) | {"q_idx": rows, "kv_idx": keys}


def _tiles(problem: Problem, scalars: dict[str, Any]) -> dict[str, Any]:
    """All tiles of all heads."""
    found = _heads(scalars, problem)
    for index, block, length, shape in (
        ("q_idx", problem.block_m, problem.seqlen_q, (1, 1, -1, 1)),
        ("kv_idx", problem.block_n, problem.seqlen_k, (1, 1, 1, -1)),
    ):
        tile = torch.arange(-(-length // block)).view(shape)
        found[f"{index}.tile"] = tile
        found[f"{index}.first"] = tile * block
        found[f"{index}.last"] = (tile * block + block).clamp(max=length) - 1
    return found
