"""What compiles and has not been run on a GPU is refused there by name, until it has been."""

from typing import Any

import pytest

import attngen
from attngen.errors import ToolchainError


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ({"problem": {"head_dim": 64, "keys": "padded"}}, "sequences with lengths of their own"),
        ({"sink": "per_head"}, "a learned sink"),
        ({"blocks": {"block_m": 128, "block_n": 128}}, "given blocks"),
        ({"tensors": {"doc": "i32[batch, seqlen_k] sorted"}, "mask": "document(doc)"}, "sorted tensors"),
    ],
)
def test_what_no_gpu_has_run_is_refused_on_one(spec: dict[str, Any], named: str) -> None:
    """The error says what it is and where it runs; a kernel without it is launched."""
    kernel = attngen.compile({"problem": {"head_dim": 64}} | spec, arch="sm_90a")
    with pytest.raises(
        ToolchainError, match=f"kernels of {named} compile, and have not been run on a GPU yet"
    ):
        kernel._launcher  # noqa: B018 a property that refuses
    assert attngen.compile({"problem": {"head_dim": 64}}, arch="sm_90a")._launcher.manifest.kernels
