"""Shared by all tests: GPU tests run only where there is a GPU."""

import pytest
import torch

torch.set_num_threads(1)  # the tensors are small, and as many tests run at a time as there are cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` on a machine without one."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
