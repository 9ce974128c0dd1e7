"""Models of transformers with attngen in them; left out where transformers is not installed (`.[test]` brings it)."""

import os
from importlib.util import find_spec

import pytest

import attngen

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is to be fetched: all models are random
collect_ignore_glob = [] if find_spec("transformers") else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def registered() -> None:
    """attngen is known to transformers, once and once more, and so is what it is judged by."""
    from tests.hf.exact_attention import register_exact

    register_exact()
    attngen.hf.register()
    attngen.hf.register()
