"""What a document declares and computes: faults of scalars, tensors, define, mask and score, each at its place.

An expression that reads a faulty declaration is not judged, so that one mistake is told once.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace

from attngen.errors import Diagnostic, ExpressionError
from attngen.expr.declarations import Declarations
from attngen.expr.declare import read_declarations
from attngen.expr.parse import ignores_score, parse_mask, parse_score
from attngen.expr.ranges import never_holds
from attngen.expr.scope import check_definitions
from attngen.expr.syntax import Locate
from attngen.expr.tree import Expr, free_names, tensor_names
from attngen.spec.document import Document
from attngen.spec.models import SpecModel

_WORD = re.compile(r"[A-Za-z_]\w*")


class Expressions:
    """The declarations and the expressions of a document, read at once.

    Attributes:
        declaration_faults: of the blocks that declare.
        text_faults: inside the texts of expressions.
        untold: how many more of those there are.
        doubts: what is legal and rarely meant.
    """

    def __init__(self, document: Document) -> None:
        self._document = document
        blocks = {block: self._texts(block) for block in ("scalars", "tensors", "define")}
        self._paths = {
            key.partition("(")[0].strip(): f"{block}.{key}"
            for block, texts in blocks.items()
            for key in texts
        }
        reading = read_declarations(**blocks, locate=document.locate)
        self.declaration_faults = reading.faults
        self.text_faults: list[Diagnostic] = []
        self.untold = 0
        self.doubts: list[Diagnostic] = []
        self._unjudged = reading.faulty
        self._declarations = self._judged(reading.declarations)
        self._tell(check_definitions(self._declarations, self._locate_of))
        mask, score = self._read("mask", parse_mask), self._read("score", parse_score)
        if mask and score and not self.declaration_faults:
            self._check_use(mask, score)

    def _texts(self, block: str) -> dict[str, str]:
        """The texts of a block; whatever else stands there is the schema's fault to tell."""
        data = self._document.data.get(block)
        pairs = data.items() if isinstance(data, dict) else ()
        return {key: text for key, text in pairs if isinstance(text, str)}

    def _judged(self, declarations: Declarations) -> Declarations:
        """Without the definitions that read what cannot be judged, and without those that read these in turn."""
        readers: dict[str, list[str]] = {}
        for name, each in declarations.definitions.items():
            for word in set(_WORD.findall(each.text)):
                readers.setdefault(word, []).append(name)
        pending = list(self._unjudged)
        while pending:
            unjudged = set(readers.get(pending.pop(), ())) - self._unjudged
            self._unjudged |= unjudged
            pending += unjudged
        judged = {name: each for name, each in declarations.definitions.items() if name not in self._unjudged}
        return replace(declarations, definitions=judged)

    def _is_unjudged(self, text: str) -> bool:
        return not self._unjudged.isdisjoint(_WORD.findall(text))

    def _read(self, path: str, parse: Callable[..., Expr]) -> Expr | None:
        """The tree of mask or score; None where it has a fault or cannot be judged."""
        text = self._document.data.get(path, SpecModel.model_fields[path].default)
        if not isinstance(text, str) or self._is_unjudged(text):
            return None
        try:
            return parse(text, self._declarations, self._locate(path), locate_of=self._locate_of)
        except ExpressionError as error:
            self._tell(error.diagnostics)
            self.untold += error.untold
            return None

    def _tell(self, faults: Iterable[Diagnostic]) -> None:
        """Record faults of texts; a definition that mask and score both read has its faults told once."""
        told = {(fault.message, fault.location) for fault in self.text_faults}
        self.text_faults += (fault for fault in faults if (fault.message, fault.location) not in told)

    def _locate(self, path: str) -> Locate | None:
        mark = self._document.marks.get(path)
        return mark.locate if mark else None

    def _locate_of(self, name: str) -> Locate | None:
        return self._locate(self._paths[name]) if name in self._paths else None

    def _check_use(self, mask: Expr, score: Expr) -> None:
        """What is declared must be read, a mask is expected to show a key, and a score to read the score."""
        read = set().union(*(free_names(expr) | tensor_names(expr) for expr in (mask, score)))
        for block, names in (
            ("scalars", self._declarations.scalars),
            ("tensors", self._declarations.tensors),
        ):
            for name in names:
                if name not in read:
                    path = f"{block}.{name}"
                    message, note = (
                        f"neither mask nor score reads {path}",
                        "every call would pass it for nothing",
                    )
                    place = self._document.locate(path, None)
                    self.declaration_faults.append(
                        Diagnostic(message, "unread-declarations", place, path, name, note)
                    )
        if never_holds(mask):
            is_window = "window" in self._document.data["mask"]
            note = "every row is 0, with lse -inf"
            note += "; -1 is a length in window, and not `without bound`" if is_window else ""
            self._doubt("mask", "mask shows no key to any query", "mask-shows-nothing", note)
        if ignores_score(score):
            note = "q and k have no part in the result but through the mask"
            self._doubt("score", "score ignores `score`", "score-ignored", note)

    def _doubt(self, path: str, message: str, rule: str, note: str) -> None:
        text = self._document.data[path]
        place = self._document.locate(path, (0, len(text.rstrip())))
        self.doubts.append(Diagnostic(message, rule, place, path, text, note))
