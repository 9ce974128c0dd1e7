"""Number formats: the facts of the table, held against torch."""

import pytest
import torch

from attngen.dtypes import DTYPES, DType, dtype, torch_dtype
from attngen.errors import InternalError


@pytest.mark.parametrize("fact", DTYPES.values(), ids=lambda fact: fact.name)
def test_the_facts_are_those_of_torch(fact: DType) -> None:
    """Size, largest finite number and distance from 1 to its neighbour."""
    known = torch.finfo(torch_dtype(fact))
    assert (known.bits, known.max, known.eps) == (fact.bits, fact.max_finite, fact.epsilon)
    assert fact.bytes == torch.empty((), dtype=torch_dtype(fact)).element_size()


def test_a_format_is_found_by_its_name_and_an_unknown_name_is_our_fault() -> None:
    """Names from users have been checked long before."""
    assert dtype("bf16").torch_name == "bfloat16"
    with pytest.raises(InternalError, match="bf17"):
        dtype("bf17")
