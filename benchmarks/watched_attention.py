"""Steps of models: how long they take, how long of that the device is at attention, and whether it is right.

Attention is what a layer calls as such: all that is launched between the moment it gets q, k and v and the moment it
returns, copies among it. On a GPU moments are events between launches: where the host is ahead of the device, which is
told, they hold nothing of the host's time.
"""

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from error_rule import Exact, Judgement, by_blocks
from figures import Figure, Medians, Present, Row, Tensors
from transformers import AttentionInterface

Step = Callable[[], Tensors]
Judge = Callable[[Step], Judgement]
Moment = float | torch.cuda.Event
CALLS = 2
"""Steps between two moments."""
ATTENTION = "'s attention"
"""Behind the name of an implementation: its attention alone."""


@contextmanager
def instead_of_attention(call: Callable[..., Any]) -> Iterator[None]:
    """Have layers call another function, of whatever implementation they are.

    Args:
        call: of the model's eager attention, of the layer's attention, and of what the layer passes to this.
    """
    chosen = AttentionInterface.get_interface

    def get_interface(self: AttentionInterface, name: str, eager: Callable[..., Any]) -> Callable[..., Any]:
        return partial(call, eager, chosen(self, name, eager))

    AttentionInterface.get_interface = get_interface
    try:
        yield
    finally:
        AttentionInterface.get_interface = chosen


def masks_of(step: Step) -> list[torch.Tensor]:
    """What a step by eager attention passes to each layer as its mask."""
    masks = []

    def note(eager: Any, attend: Any, module: Any, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> Any:
        masks.append(mask)
        return attend(module, q, k, v, mask, **options)

    with instead_of_attention(note):
        step()
    return masks


def layer_by_layer(masks: list[torch.Tensor], step: Step) -> Judgement:
    """Hold what attention gives in each layer to eager attention of the same q, k and v, by blocks of rows.

    Args:
        masks: of each layer, as tensors that are added to scores.
        step: of any implementation.
    """
    found: list[Judgement] = []

    def held(eager: Any, attend: Any, module: Any, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> Any:
        made = attend(module, q, k, v, mask, **options)
        added = masks[len(found)]
        exact, rounded = (
            eager(module, *(x.to(dtype) for x in (q, k, v, added)), **options)[0]
            for dtype in (torch.float32, q.dtype)
        )
        found.append(Exact(by_blocks(exact), by_blocks(rounded)).judged(by_blocks(made[0])))
        return made

    with instead_of_attention(held):
        step()
    if len(found) != len(masks):
        raise RuntimeError(f"a step called attention {len(found)} times, and by eager attention {len(masks)}")
    return Judgement.worst(found)


def now(device: str) -> Moment:
    """This moment, when the device gets to it."""
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(begin: Moment, end: Moment) -> float:
    """From one moment to another, which is waited for."""
    if isinstance(begin, float):
        return (end - begin) * 1e3
    end.synchronize()
    return begin.elapsed_time(end)


@dataclass(frozen=True)
class Steps:
    """The same step by several implementations of attention, timed in one interleaved run.

    Attributes:
        steps: by the name of the implementation.
        judge: what holds a step to what is exact.
        device: of them all.
        is_watched: whether attention is timed by itself too.
        figures: what follows of medians; those of attention have ATTENTION behind the name.
        facts: what else there is to say.
    """

    steps: Mapping[str, Step]
    judge: Judge
    device: str
    is_watched: bool
    figures: Callable[[Medians], Iterable[Figure]]
    facts: Mapping[str, Any]

    def measure(self, rounds: int) -> Row:
        """Time whoever is right."""
        judged = {name: self.judge(step) for name, step in self.steps.items()}
        right = {name: step for name, step in self.steps.items() if judged[name].is_right}
        samples: dict[str, list[float]] = {}
        ahead = dict.fromkeys(right, True)
        order, generator = list(right), random.Random(0)
        for _ in range(rounds):
            generator.shuffle(order)
            for name in order:
                taken, is_ahead = self._timed(right[name])
                for part, ms in taken.items():
                    samples.setdefault(f"{name}{part}", []).append(ms)
                ahead[name] &= is_ahead
        medians = Present((name, median(times)) for name, times in samples.items())
        figures = [*self.figures(medians)]
        if self.is_watched:
            all_ahead = float(all(ahead.values()))
            figures.append(Figure("host ahead of the device in all rounds", all_ahead, at_least=1.0))
        return {
            "ms": dict(sorted(samples.items())),
            "differences": {name: each.error for name, each in judged.items()},
            "of_allowed": {name: each.of_allowed for name, each in judged.items()},
            "wrong": sorted(judged.keys() - right.keys()),
            "figures": figures,
            "is_host_ahead": ahead,
            **self.facts,
        }

    def _timed(self, step: Step) -> tuple[dict[str, float], bool]:
        """Milliseconds of a step and of its attention, and whether the host was ahead of a GPU to the last launch."""
        step()  # behind which the host gets ahead; and the card's clock follows the power of what ran last
        begin = now(self.device)
        for _ in range(CALLS):
            step()
        end, spans = now(self.device), []

        def timed(eager: Any, attend: Callable[..., Any], *args: Any, **options: Any) -> Any:
            began = now(self.device)
            made = attend(*args, **options)
            spans.append((began, now(self.device)))
            return made

        if self.is_watched:
            with instead_of_attention(timed):
                step()
        is_ahead = isinstance(end, float) or not end.query()
        taken = {"": milliseconds(begin, end) / CALLS}
        if self.is_watched:
            taken[ATTENTION] = sum(milliseconds(*span) for span in spans)
        return taken, is_ahead
