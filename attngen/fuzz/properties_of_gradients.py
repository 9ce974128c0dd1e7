"""The properties of dq, dk and dv, each a function from a trial to a complaint."""

from collections.abc import Iterable

import torch

from attngen.check.judging import judge_gradients
from attngen.fuzz.trial import SIMULATOR_ULPS, Complaint, Trial, largest


def gradients(trial: Trial) -> Complaint:
    """Gradients are within their bound, for the out and lse that the call returned."""
    case, made = trial.case, trial.first_gradients
    assert trial.dout is not None
    with trial.state():
        verdict = judge_gradients(
            case.spec,
            made,
            (trial.q, trial.k, trial.v),
            trial.dout,
            trial.out,
            trial.lse,
            trial.dlse,
            case.softmax_scale,
            declared=trial.declared,
        )
    return None if verdict.ok else str(verdict)


def repeated_gradients(trial: Trial) -> Complaint:
    """A second backward pass gives the same bits."""
    return first_difference(trial.gradients(), trial.first_gradients)


def scaled_gradients(trial: Trial) -> Complaint:
    """Of 8 times the gradients of out and lse, gradients are 8 times as large, to the bit: no rounding is another.

    But for what terms below the normal numbers of f32 and bf16, where roundings are others, come to in a sum.
    """
    eightfold = tuple(8.0 * x for x in trial.first_gradients)
    return first_difference(trial.gradients(8.0), eightfold, floor=2.0**-110)


def sliced_gradients(trial: Trial) -> Complaint:
    """The last element of the batch, alone, has the same gradients, to the bit on a GPU (as of `batch_slice`)."""
    last = slice(max(0, trial.q.shape[0] - 1), None)
    ulps = SIMULATOR_ULPS if trial.device == "cpu" else 0
    of_inputs = tuple(x[last] for x in trial.first_gradients[:3])  # a sink's is the sum over the batch
    return first_difference(trial.gradients(batch=last)[:3], of_inputs, ulps)


def first_difference(
    got: Iterable[torch.Tensor],
    expected: Iterable[torch.Tensor],
    ulps: int = 0,
    floor: float = 0.0,
    names: tuple[str, ...] = ("dq", "dk", "dv", "dsink"),
) -> Complaint:
    """A complaint where tensors differ by more than a floor, and than units in the last place of the largest."""
    for name, x, y in zip(names, got, expected, strict=False):
        slack = max(floor, ulps * torch.finfo(x.dtype).eps * largest(y))
        same = (x == y) | (x.isnan() & y.isnan()) | ((x.float() - y.float()).abs() <= slack)
        if not bool(same.all()):
            index = tuple((~same).nonzero()[0].tolist())
            return f"{name}[{', '.join(map(str, index))}] is {x[index]:.8g}, was {y[index]:.8g}"
    return None
