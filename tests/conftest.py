"""Shared by all tests: GPU tests run only where there is a GPU; what is compiled is kept for one run of the tests."""

import atexit
import os
import shutil
import tempfile

import pytest
import torch

from attngen.runtime.cache import CACHE_DIR_VARIABLE

torch.set_num_threads(1)  # the tensors are small, and as many tests run at a time as there are cores
if CACHE_DIR_VARIABLE not in os.environ:  # processes that run tests side by side inherit it
    os.environ[CACHE_DIR_VARIABLE] = tempfile.mkdtemp(prefix="attngen-tests-")
    atexit.register(shutil.rmtree, os.environ[CACHE_DIR_VARIABLE], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` on a machine without one."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
