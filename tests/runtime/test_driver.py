"""The driver's calls, with a stand-in for the bindings: what is called, in which order, and what an error says."""

from collections.abc import Callable
from typing import Any

import pytest

import attngen
from attngen.runtime import driver

bindings = pytest.importorskip("cuda.bindings.driver")
RESULTS = bindings.CUresult


class Bindings:
    """Stands for `cuda.bindings.driver`: records calls, answers what the test says; types are real."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.answers: dict[str, Callable[..., tuple[Any, ...]]] = {
            "cuGetErrorString": lambda code: (RESULTS.CUDA_SUCCESS, b"words of the driver")
        }
        monkeypatch.setattr(driver, "_driver", lambda: self)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu") or isinstance(getattr(bindings, name), type):
            return getattr(bindings, name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            return self.answers.get(name, lambda *_: (RESULTS.CUDA_SUCCESS, None))(*arguments)

        return call

    def names(self) -> list[str]:
        """What was called, in order."""
        return [call[0] for call in self.calls]


@pytest.mark.parametrize(
    ("code", "cure"),
    [
        (RESULTS.CUDA_ERROR_INVALID_VALUE, "explain_launch"),
        (RESULTS.CUDA_ERROR_INVALID_CONTEXT, "spawn"),
        (RESULTS.CUDA_ERROR_OUT_OF_MEMORY, "empty_cache"),
        (RESULTS.CUDA_ERROR_NO_BINARY_FOR_GPU, "--arch"),
        (RESULTS.CUDA_ERROR_UNKNOWN, "nvidia-smi"),
    ],
)
def test_an_error_of_the_driver_comes_with_words_and_a_cure(
    monkeypatch: pytest.MonkeyPatch, code: Any, cure: str
) -> None:
    """Never a bare code: what attngen was doing, the driver's own words and what to do about it."""
    Bindings(monkeypatch).answers["cuLibraryLoadData"] = lambda *_: (code, None)
    with pytest.raises(attngen.ToolchainError) as caught:
        driver.Module(b"cubin")
    assert str(caught.value).startswith(f"loading the kernel: {code.name} (words of the driver)")
    assert cure in caught.value.cure
