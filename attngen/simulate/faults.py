"""What a plan can do wrong when it runs, told with the step, the place, the tile and the rule."""

from typing import Literal

from attngen.errors import InternalError
from attngen.plan import Step

Rule = Literal[
    "race",
    "not fenced",
    "uninitialised read",
    "out of bounds",
    "never landed",
    "never written",
    "never reset",
    "partial sum",
    "another format",
    "not once",
    "undefined index",
    "wrong grid",
    "deadlock",
]
"""The promises that the simulator holds every program to."""


class SimulationFault(InternalError):
    """A program broke a rule; no GPU would have told, or not always.

    Attributes:
        rule: which promise was broken.
        step: the Step that broke it; None where it is a fault of the whole program.
        place: the buffer, register or tensor it is about; empty where there is none.
        where: the tile and the loops' indices.
    """

    def __init__(
        self, rule: Rule, message: str, *, step: Step | None = None, place: str = "", where: str = ""
    ) -> None:
        at_step = f"\n  in {type(step).__name__} `{str(step).splitlines()[0]}`" if step else ""
        super().__init__(f"{rule}: {message}{at_step}{f' of {where}' if where else ''}")
        self.rule = rule
        self.step = step
        self.place = place
        self.where = where
