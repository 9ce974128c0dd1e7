"""What a GPU makes of expressions: values bit by bit, classes of tiles, tables, and the errors of functions."""

import pytest
import torch

from attngen.arch import arch_for_capability
from tests.language.elementwise import check_elementwise, draw_expressions
from tests.language.functions import measure_functions
from tests.language.language import CLASSED, masks_among
from tests.language.tiles_on_gpu import check_tiles

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]


def target() -> str:
    return arch_for_capability(torch.cuda.get_device_capability()).name


def test_expressions_have_the_values_of_torch() -> None:
    """200 random expressions, over indices up to the largest and tensors with NaN and infinities, bit by bit."""
    wrong = check_elementwise(draw_expressions(200, seed=5), target(), seed=5)
    assert not wrong, "\n\n".join(map(str, wrong[:3]))


def test_tiles_have_the_classes_of_the_simulator() -> None:
    """Every tile of random masks, and every entry of the tables that their classes read."""
    masks = masks_among(draw_expressions(200, seed=6))[:CLASSED]
    wrong = check_tiles(masks, target(), seed=6)
    assert len(masks) >= 40
    assert not wrong, "\n\n".join(map(str, wrong[:3]))


@pytest.mark.parametrize("exact", [True, False], ids=["in masks", "in scores"])
def test_functions_err_by_no_more_than_is_stated(exact: bool) -> None:
    """Over all exponents of f32; what `tests/language/functions.py` states is what the docs say."""
    for measured in measure_functions(target(), exact):
        print(measured)
        assert measured.ok, str(measured)
