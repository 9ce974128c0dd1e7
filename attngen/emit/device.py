"""The device library: plain CUDA paragraphs, of which an emitted kernel carries those it uses.

A file of `templates/device` is a sequence of paragraphs separated by blank lines; each is one definition under
its comment. `used_by` follows the names from a text to the paragraphs it needs. No CUDA is written here.
"""

import re
from functools import cache
from pathlib import Path

from attngen.resources import templates_dir

# Definitions stand before their uses: a file may use those before it, a paragraph those above it.
FILES = (
    "types.cuh",
    "ptx/cp_async.cuh",
    "ptx/ldmatrix.cuh",
    "ptx/shared.cuh",
    "ptx/math.cuh",
    "element.cuh",
    "tile.cuh",
    "copy.cuh",
    "fragment.cuh",
    "gemm.cuh",
    "softmax.cuh",
)
_DEFINED = re.compile(r"^(?:DEV [\w&]+ |struct )(\w+)", re.MULTILINE)
_NAME = re.compile(r"[A-Za-z_]\w*")
_COMMENT = re.compile(r"//[^\n]*")


@cache
def _paragraphs(folder: Path) -> tuple[tuple[frozenset[str], str], ...]:
    """(names it defines, text) of every paragraph, in order."""
    texts = "\n\n".join((folder / file).read_text(encoding="utf-8").strip("\n") for file in FILES)
    return tuple((frozenset(_DEFINED.findall(text)[:1]), text) for text in texts.split("\n\n"))


def used_by(text: str) -> list[str]:
    """The paragraphs that a text needs, directly or through others, in the library's order.

    A paragraph that names nothing (types and macros) is always there.
    """
    paragraphs = _paragraphs(templates_dir() / "device")
    wanted = _names(text)
    needed: list[str] = []
    for names, paragraph in reversed(paragraphs):
        if not names or names & wanted:
            needed.append(paragraph)
            wanted |= _names(paragraph)
    return needed[::-1]


def _names(text: str) -> set[str]:
    return set(_NAME.findall(_COMMENT.sub("", text)))
