"""How sequences are cut that have lengths of their own: kinds for a spec, and rows for a call.

Many are short or empty, one may be long among them; rows that do not count lie before and behind them, and behind all.
"""

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from attngen.check.cuts import Cut
from attngen.check.inputs import Shape
from attngen.plan import LETTERS, KernelPlan

KINDS = (("ragged", "ragged"), ("padded", "padded"), ("dense", "padded"), ("dense", "ragged"), ("ragged", "padded"),
         ("padded", "ragged"), ("ragged", "dense"))  # fmt: skip
"""Of queries and keys; the first is drawn most."""
PAGED_KINDS = (("dense", "paged"), ("ragged", "paged"), ("padded", "paged"))
"""Those of kernels that know pages."""
PAGES = (16, 1, 2, 3, 7, 64)
PAGES_IN_PIECES = (16, 8, 24, 40, 64, 256)
"""Of kernels that bring pieces of a page by the copy engine, which pages of other sizes have none of."""
MOST_SEQUENCES = 6
_SHORT = st.integers(0, 3)
_UNUSED = st.sampled_from((0, 1, 2, 5, 17))


def kinds(has_pages: bool) -> SearchStrategy[dict[str, str]]:
    """What `problem` says of queries and keys, which may lie in pages where kernels know these."""
    drawn = st.sampled_from((*3 * KINDS[:1], *KINDS, *(2 * PAGED_KINDS if has_pages else ())))
    return drawn.map(lambda found: dict(zip(LETTERS, found, strict=True)))


@st.composite
def cut_shapes(draw: DrawFn, plan: KernelPlan, whole: Shape, one: dict[str, SearchStrategy[int]]) -> Shape:
    """A shape with sequences where the kernel has them; keys in pieces of pages begin with the first that counts.

    Args:
        draw: of Hypothesis.
        plan: of the kernel.
        whole: the rest of the shape.
        one: a length, by axis.
    """
    pages = PAGES_IN_PIECES if plan.takes_pieces else PAGES
    count = draw(st.sampled_from((1, 2, 3, 4, MOST_SEQUENCES, 3, 2, 5, 0)))
    changes: dict[str, Any] = {"batch": count}
    for axis, letter in LETTERS.items():
        if (kind := plan.lengths.of(axis)) == "dense":
            continue
        alike = changes.get("queries") if axis == "keys" and draw(st.integers(0, 2)) == 0 else None
        lengths = alike.lengths if alike else draw(_lengths(count, one[axis]))
        cut = Cut(
            kind=kind,
            lengths=lengths,
            skipped=draw(_rows(count, 3)) if axis == "keys" and not plan.takes_pieces else (),
            unused=draw(_rows(count, 2)) if kind == "ragged" else (),
            tail=draw(_UNUSED),
            page=draw(st.sampled_from(pages)) if kind == "paged" else 0,
        )
        changes |= {axis: cut, f"seqlen_{letter}": cut.size}
    return replace(whole, **changes)


@st.composite
def _lengths(draw: DrawFn, count: int, one: SearchStrategy[int]) -> tuple[int, ...]:
    """Of so many sequences: one long among short ones, or each as long as it comes."""
    if count and draw(st.booleans()):
        short = [draw(_SHORT) for _ in range(count - 1)]
        short.insert(draw(st.integers(0, count - 1)), draw(one))
        return tuple(short)
    return tuple(draw(st.one_of(_SHORT, one)) for _ in range(count))


@st.composite
def _rows(draw: DrawFn, count: int, seldom: int) -> tuple[int, ...]:
    """Rows of each sequence that do not count; mostly none."""
    return tuple(draw(_UNUSED) for _ in range(count)) if draw(st.integers(0, seldom)) == seldom else ()
