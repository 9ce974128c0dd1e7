"""The device library: plain CUDA paragraphs, of which an emitted kernel carries those it uses.

A file of `templates/device` is a sequence of paragraphs separated by blank lines; each is one definition under
its comment. `used_by` follows the names from a text to the paragraphs it needs. No CUDA is written here.
"""

import re
from collections.abc import Sequence
from functools import cache

from attngen.resources import templates_dir

# Definitions stand before their uses: a file may use those before it, a paragraph those above it.
INSTRUCTIONS = (
    "types.cuh",
    "ptx/cp_async.cuh",
    "ptx/ldmatrix.cuh",
    "ptx/stmatrix.cuh",
    "ptx/shared.cuh",
    "ptx/global.cuh",
    "ptx/math.cuh",
    "ptx/mbarrier.cuh",
    "ptx/barrier.cuh",
    "ptx/grid.cuh",
    "ptx/tma.cuh",
    "ptx/wgmma.cuh",
)
"""One function per instruction."""
FUNCTIONS = (
    "element.cuh",
    "tile.cuh",
    "panel.cuh",
    "ring.cuh",
    "pages.cuh",
    "copy.cuh",
    "fragment.cuh",
    "shares.cuh",
    "gemm.cuh",
    "cache.cuh",
    "warpgroup_gemm.cuh",
    "scales.cuh",
    "softmax.cuh",
    "expression.cuh",
    "quantize.cuh",
    "gradient.cuh",
    "tile_list.cuh",
)
"""What the Steps call."""
_DEFINED = re.compile(r"^(?:DEV [\w&]+ |struct (?:__align__\(\d+\) )?|constexpr u64 )(\w+)", re.MULTILINE)
_NAME = re.compile(r"\b[A-Za-z_]\w*")
_COMMENT = re.compile(r"//[^\n]*")


@cache
def paragraphs(files: tuple[str, ...]) -> tuple[str, ...]:
    """The paragraphs of some files of the library, in order."""
    folder = templates_dir() / "device"
    texts = ((folder / file).read_text(encoding="utf-8").strip("\n") for file in files)
    return tuple("\n\n".join(texts).split("\n\n"))


def used_by(text: str, instructions: Sequence[str] = ()) -> list[str]:
    """The paragraphs that a text needs, directly or through others, in the library's order.

    A paragraph that names nothing (types and macros) is always there.

    Args:
        text: of a kernel.
        instructions: paragraphs made for it, which join the library's instructions.
    """
    library = (*paragraphs(INSTRUCTIONS), *instructions, *paragraphs(FUNCTIONS))
    defined = [(frozenset(_DEFINED.findall(paragraph)[:1]), paragraph) for paragraph in library]
    wanted = names_in(text)
    needed: list[str] = []
    for names, paragraph in reversed(defined):
        if not names or names & wanted:
            needed.append(paragraph)
            wanted |= names_in(paragraph)
    return needed[::-1]


def names_in(text: str) -> set[str]:
    """The identifiers of a text of C++, those of comments apart."""
    return set(_NAME.findall(_COMMENT.sub("", text)))
