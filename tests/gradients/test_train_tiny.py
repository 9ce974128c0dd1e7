"""The training example on the simulator: the loss falls as torch's does, and its script writes what it says."""

import csv
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.gradients.training import falls_to, is_near, train_tiny

Curves = dict[str, list[float]]


@pytest.fixture(scope="module")
def curves() -> Curves:
    example = train_tiny()
    return {name: example.train(each, example.ON["cpu"], "cpu") for name, each in example.ATTENTIONS.items()}


def test_losses_fall_as_those_of_torch(curves: Curves) -> None:
    """The same model, seed and batches: the curve lies no further from f32 than rounding explains."""
    assert all(falls_to(losses, 0.7) for losses in curves.values())
    assert is_near(curves["attngen bf16"], curves)


class Cut(torch.autograd.Function):
    """A tensor as it is, whose gradient is 0 from a row on."""

    @staticmethod
    def forward(ctx, x: Tensor, first: int) -> Tensor:
        ctx.first = first
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        kept = torch.arange(gradient.shape[1]).view(-1, 1, 1) < ctx.first
        return torch.where(kept, gradient, 0.0), None


@pytest.mark.parametrize(("place", "first"), [(0, 0), (1, 0), (2, 0), (2, 40)])
def test_a_gradient_that_is_missing_shows(place: int, first: int, curves: Curves) -> None:
    """Without one of the three, or without dV of the last eight keys, the curve is further off than allowed."""
    example = train_tiny()

    def attention(*qkv: Tensor) -> Tensor:
        cut = [Cut.apply(x, first) if i == place else x for i, x in enumerate(qkv)]
        return example.with_attngen(*cut)

    assert not is_near(example.train(attention, example.ON["cpu"], "cpu"), curves)


def test_the_table_has_every_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A column a curve, to the last bit; a picture beside it where there is matplotlib, and else a word about it."""
    made = {"one": [3.25, 2.0] * 6, "other": [1 / 3, 0.5] * 6}
    table, *pictures = train_tiny().write(made, tmp_path)
    names, *rows = csv.reader(table.open(encoding="utf-8", newline=""))
    assert names == ["one", "other"]
    assert [tuple(map(float, row)) for row in rows] == list(zip(*made.values(), strict=True))
    assert all(each.stat().st_size > 1000 for each in pictures)
    assert bool(pictures) != ("no picture" in capsys.readouterr().out)


def test_the_script_tells_what_it_found(
    curves: Curves, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """How far each loss fell, how far curves lie apart, and what was written."""
    example = train_tiny()
    found = iter(curves.values())
    monkeypatch.setattr(example, "train", lambda attention, sizes, device: next(found))
    monkeypatch.setattr("sys.argv", ["train_tiny.py", "--device", "cpu", "--out", str(tmp_path)])
    example.main()
    told = capsys.readouterr().out
    for name, losses in curves.items():
        assert f"{name}: from {losses[0]:.3f} to " in told
    apart = example.distance(curves["attngen bf16"], curves["torch f32"])
    assert f"attngen bf16 and torch f32 lie {apart:.1e} nats apart" in told
    assert str(tmp_path / "train_tiny.csv") in told and (tmp_path / "train_tiny.csv").is_file()
