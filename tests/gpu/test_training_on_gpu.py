"""The training example on a GPU: two hundred steps with attngen, beside torch in f32 and in bf16."""

import pytest

from tests.gradients.training import falls_to, is_near, train_tiny

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]


def test_a_model_trains_as_with_torch() -> None:
    """The losses fall below what frequencies of characters tell, 3.25 nats, and the curves are one within rounding."""
    example = train_tiny()
    sizes = example.ON["cuda"]
    assert sizes.steps == 200
    curves = {name: example.train(each, sizes, "cuda") for name, each in example.ATTENTIONS.items()}
    assert all(falls_to(losses, 0.6) for losses in curves.values())
    told = {name: example.distance(losses, curves["torch f32"]) for name, losses in curves.items()}
    assert is_near(curves["attngen bf16"], curves), told
