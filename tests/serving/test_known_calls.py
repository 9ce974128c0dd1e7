"""Which calls go the short way: those of a signature that has been checked, whose tensors lie as they may."""

from typing import Any

import pytest
import torch

from attngen.serving.known_calls import KnownCalls, signature_of

LAUNCH: Any = object()
UNITS = {"row": 16}


def memory(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def test_a_signature_is_all_but_addresses_and_numbers() -> None:
    """What decides whether a call is taken, and what is launched, is another key; other memory is the same one."""
    x = memory(4, 16)
    key = signature_of((x, None, 1.0, "nhd"))
    assert key == signature_of((memory(4, 16).add_(1), None, 1.0, "nhd"))
    with torch.inference_mode():
        inferred = memory(4, 16)
    others = [
        (memory(5, 16)[:4], None, 1.0, "nhd"),  # as much memory as is not there
        (memory(4, 32)[:, :16], None, 1.0, "nhd"),
        (x.half(), None, 1.0, "nhd"),
        (torch.nn.Parameter(memory(4, 16)), None, 1.0, "nhd"),
        (memory(4, 16).requires_grad_(), None, 1.0, "nhd"),
        (inferred, None, 1.0, "nhd"),
        (x, None, 1, "nhd"),
        (x, None, True, "nhd"),
        (x, None, 1.0, "hnd"),
        (x, x, 1.0, "nhd"),
    ]
    keys = [key, *map(signature_of, others)]
    with torch.no_grad():
        keys.append(signature_of((x, None, 1.0, "nhd")))
    assert None not in keys and len(set(keys)) == len(keys)


@pytest.mark.parametrize("value", [[1], torch.eye(2).to_sparse(), {}], ids=["list", "sparse", "dict"])
def test_what_is_no_key_is_never_known(value: Any) -> None:
    """Nothing is remembered of it."""
    calls, x = KnownCalls(), memory(4, 16)
    assert signature_of((x, value)) is None
    calls.learn(None, LAUNCH, {"row": x}, UNITS)
    assert calls.find(None, [x]) is None


def test_only_what_starts_where_it_must_is_taken() -> None:
    """Rows off 16 bytes, or without memory, go the long way; what may start anywhere does not."""
    calls, x, number = KnownCalls(), memory(4, 16), torch.zeros(9, dtype=torch.int32)
    calls.learn("key", LAUNCH, {"row": x, "number": number[1:]}, UNITS)
    assert calls.find("key", [memory(4, 16), number[3:]]) is LAUNCH
    assert calls.find("other", [x, number]) is None
    assert calls.find("key", [memory(80)[1:65].view(4, 16), number]) is None
    assert calls.find("key", [memory(0, 16), number]) is None


def test_what_is_written_shares_memory_only_as_was_checked() -> None:
    """Side by side at the distance that was found right, in other memory too; at another one it is looked at again."""
    calls, both = KnownCalls(), memory(6, 2, 16)
    names = ("row", "k_cache", "v_cache")

    def passed(k: torch.Tensor, v: torch.Tensor, row: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return dict(zip(names, (memory(4, 16) if row is None else row, k, v), strict=True))

    calls.learn("key", LAUNCH, passed(both[:, 0], both[:, 1]), UNITS, names[1:])
    other = memory(6, 2, 16)
    for known, call in (
        (True, passed(both[:, 0], both[:, 1])),
        (True, passed(other[:, 0], other[:, 1])),
        (True, passed(other[:, 0], both[:, 1])),
        (False, passed(both[:, 0], both[:, 0])),
        (False, passed(both[:, 1], both[:, 0])),
        (False, passed(both[:, 0], both[:, 1], both[:2].view(4, 16))),
    ):
        assert (calls.find("key", call.values()) is LAUNCH) == known
    calls.learn("key", LAUNCH, passed(both[:, 1], both[:, 0]), UNITS, names[1:])
    assert all(calls.find("key", passed(both[:, i], both[:, 1 - i]).values()) is LAUNCH for i in (0, 1))


def test_nothing_is_known_inside_transforms() -> None:
    """There a tensor stands for others."""
    calls, x = KnownCalls(), memory(4, 16)
    calls.learn("key", LAUNCH, {"row": x}, UNITS)
    found = []
    torch.func.vmap(lambda y: found.append(calls.find("key", [x])) or y)(torch.zeros(2))
    assert found == [None] and calls.find("key", [x]) is LAUNCH
