"""Arguments that a kernel cannot take are named, before anything is touched."""

import pytest
import torch

import attngen
from attngen.bind import check_arguments
from attngen.bind.arguments import strides
from attngen.expr import LARGEST_INDEX, LARGEST_LENGTH, LARGEST_TILE

KERNEL = attngen.compile({"problem": {"head_dim": 64}, "mask": "causal"}, arch="sm_90a")


def tensors(heads_kv: int = 2) -> dict[str, torch.Tensor]:
    shapes = {"q": (2, 16, 4, 64), "k": (2, 24, heads_kv, 64), "v": (2, 24, heads_kv, 64)}
    return {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}


def refused(**changes: object) -> attngen.ArgumentError:
    out = {"into": {"out": changes.pop("out")}} if "out" in changes else {}
    arguments = {**tensors(), "softmax_scale": None, "layout": "bshd"} | changes | out
    with pytest.raises(attngen.ArgumentError) as caught:
        check_arguments(KERNEL.manifest, **arguments)
    return caught.value


def test_good_arguments_pass() -> None:
    """The sizes and strides come back, a stride of a size-1 dimension as 0."""
    given = check_arguments(KERNEL.manifest, **tensors(), softmax_scale=None, layout="bshd")
    sizes = {"batch": 2, "seqlen_q": 16, "seqlen_k": 24, "num_heads_q": 4, "num_heads_kv": 2, "group": 2}
    assert given.sizes == sizes
    assert strides(given.tensors["q"]) == (16 * 4 * 64, 4 * 64, 64, 1)
    assert strides(given.tensors["q"][:1, :, :1]) == (0, 4 * 64, 0, 1)


@pytest.mark.parametrize(
    ("changes", "argument", "word"),
    [
        ({"q": torch.zeros(2, 16, 4, 64)}, "q", "bfloat16"),
        ({"k": torch.zeros(2, 24, 2, 64, dtype=torch.bfloat16, device="meta")}, "k", "device"),
        ({"v": torch.zeros(24, 2, 64, dtype=torch.bfloat16)}, "v", "dimensions"),
        ({"q": torch.zeros(2, 16, 4, 128).bfloat16()[..., ::2]}, "q", "stride 2"),
        ({"q": torch.zeros(2, 16, 4, 32).bfloat16()}, "q", "shape"),
        ({"v": torch.zeros(2, 23, 2, 64).bfloat16()}, "v", "shape"),
        (
            {"k": torch.zeros(2, 24, 3, 64).bfloat16(), "v": torch.zeros(2, 24, 3, 64).bfloat16()},
            "k",
            "divisor",
        ),
        ({"q": torch.zeros(2, 16, 4, 64).bfloat16().requires_grad_()}, "q", "grad"),
        ({"softmax_scale": float("nan")}, "softmax_scale", "finite"),
        ({"softmax_scale": -3e38}, "softmax_scale", "1.7e+38"),
        ({"softmax_scale": torch.ones(1)}, "softmax_scale", "pass softmax_scale.item()"),
        ({"layout": "sbhd"}, "layout", "bhsd"),
        ({"q": torch.zeros(2 * 16 * 4 * 64 + 1).bfloat16()[1:].view(2, 16, 4, 64)}, "q", "16"),
        ({"q": torch.zeros(2, 16, 4, 68).bfloat16()[..., :64]}, "q", "multiple of 8"),
        ({"out": torch.zeros(2, 16, 4, 64)}, "out", "bfloat16"),
        ({"out": torch.zeros(2, 15, 4, 64).bfloat16()}, "out", "shape"),
        ({"out": torch.zeros(1, 16, 4, 64).bfloat16().expand(2, 16, 4, 64)}, "out", "overlap itself"),
    ],
)
def test_a_fault_is_named(changes: dict[str, object], argument: str, word: str) -> None:
    """The error holds the argument and what was wrong with it, as attributes and as text."""
    error = refused(**changes)
    assert error.argument == argument
    assert word in str(error) and str(error).startswith(f"argument {argument}: got ")


def test_a_length_leaves_room_for_the_last_tile() -> None:
    """The last tile of the longest sequence ends at an index; one row more is refused, of q and of k."""
    assert LARGEST_LENGTH == 2**30 - 512 and LARGEST_LENGTH - 1 + LARGEST_TILE == LARGEST_INDEX
    given = {name: x[:, :1].expand(-1, LARGEST_LENGTH + 1, -1, -1) for name, x in tensors().items()}
    for changes in ({"q": given["q"]}, {"k": given["k"], "v": given["v"]}):
        error = refused(**changes)
        assert error.argument == next(iter(changes))
        assert (error.got, error.expected) == (f"length {2**30 - 511}", "at most 2^30 - 512")
    given = {name: x[:, 1:] for name, x in given.items()}
    sizes = check_arguments(KERNEL.manifest, **given, softmax_scale=None, layout="bshd").sizes
    assert sizes["seqlen_q"] == sizes["seqlen_k"] == LARGEST_LENGTH


def test_out_may_not_be_an_input() -> None:
    """Writing over q while other blocks read it would be a race."""
    given = tensors()
    assert refused(q=given["q"], out=given["q"]).argument == "out"
    shifted = torch.zeros(2 * 17 * 4 * 64).bfloat16()
    q, out = shifted[: 2 * 16 * 256].view(2, 16, 4, 64), shifted[256 : 256 + 2 * 16 * 256].view(2, 16, 4, 64)
    assert refused(q=q, out=out).argument == "out"


def test_out_may_be_a_slice_of_a_packed_tensor() -> None:
    """Columns of one buffer that never meet are legal: q, and out beside it."""
    packed = torch.zeros(2, 16, 8, 64).bfloat16()
    q, out = packed[:, :, :4], packed[:, :, 4:]
    check_arguments(
        KERNEL.manifest, **(tensors() | {"q": q}), softmax_scale=None, into={"out": out}, layout="bshd"
    )


def test_nothing_is_touched_by_a_refused_call() -> None:
    """The output that was passed keeps its values."""
    given = tensors()
    out = torch.full((2, 16, 4, 64), 7.0).bfloat16()
    with pytest.raises(attngen.ArgumentError):
        KERNEL(given["q"], given["k"][:, :, :1], given["v"], out=out)
    assert (out == 7).all()


def test_explain_launch_names_grid_and_workspaces() -> None:
    """Serial runs one block a head and says what it allocates; meta tensors will do."""
    serial = attngen.compile({"problem": {"head_dim": 64}, "schedule": {"kind": "serial"}}, arch="sm_90a")
    q = torch.empty(2, 100, 4, 64, dtype=torch.bfloat16, device="meta")
    (report,) = serial.explain_launch(q, q, q)
    assert (report.grid, report.threads) == (8, 128)
    assert report.workspace_bytes == {"o_acc": 4 * 2 * 4 * 100 * 64, "saved_max": 3200, "saved_sum": 3200}
