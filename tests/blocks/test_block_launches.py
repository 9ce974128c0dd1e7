"""What is launched for given blocks, and where the launcher puts maps and lists: a recorder stands for the driver."""

import pytest
import torch

from attngen.bind import spread_blocks
from attngen.plan import BLOCK_LISTS, BLOCK_MAP, GRADIENTS_INTAKE, MORE_BLOCK_LISTS, MapBlocks
from tests.blocks.block_cases import BlockCase, lists_of
from tests.blocks.test_block_lists import BlockSparse
from tests.runtime.test_declared import Recorder

CASE = BlockCase(
    "warp_specialized", blocks=(128, 128), tile=None, lengths=(200, 300), dim=64, target="sm_90a"
)
KERNEL = CASE.kernel
SHEET = next(kernel.name for kernel in KERNEL.call.kernels if isinstance(kernel, MapBlocks))


def passed(blocks: object) -> dict[str, torch.Tensor]:
    return dict(spread_blocks({"blocks": blocks}, *CASE.blocks))


def test_a_map_is_read_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch, with the map's address, strides and sizes, a stride of 0 among them."""
    recorder, (q, k, v, _) = Recorder(monkeypatch, KERNEL), CASE.inputs()
    kept = CASE.drawn()[:1].expand(2, -1, -1, -1)
    recorder.run(q, k, v, **passed(kept))
    ((name, grid, sent),) = recorder.sent
    assert name == KERNEL.plan.name and grid > 0
    assert sent[f"{BLOCK_MAP}.ptr"] == kept.data_ptr()
    assert [sent[f"{BLOCK_MAP}.stride_{i}"] for i in range(4)] == list(kept.stride())
    sizes = ("size.blocks_batch", "size.blocks_heads", "size.blocks_m", "size.blocks_n")
    assert [sent[size] for size in sizes] == [2, 4, 2, 3]


@pytest.mark.parametrize("kinds", [1, 2])
def test_lists_become_a_map_before_the_kernel(kinds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of threads for each row; what the sheet writes is what the kernel reads; lists that are not are 0."""
    recorder, (q, k, v, _) = Recorder(monkeypatch, KERNEL), CASE.inputs()
    lists = [lists_of(CASE.drawn(seed=seed)) for seed in range(kinds)]
    recorder.run(q, k, v, **passed(BlockSparse(*(x for kind in lists for x in kind))))
    (sheet, rows, made), (attention, _, read) = recorder.sent
    assert (sheet, attention, rows) == (SHEET, KERNEL.plan.name, 2 * 4 * 2)
    assert made[f"{BLOCK_MAP}.ptr"] == read[f"{BLOCK_MAP}.ptr"] != 0
    assert [read[f"{BLOCK_MAP}.stride_{i}"] for i in range(4)] == [24, 6, 3, 1]
    assert [made[f"size.blocks_{name}"] for name in ("heads", "m", "n")] == [4, 2, 3]
    for names, kind in zip((BLOCK_LISTS, MORE_BLOCK_LISTS), [*lists, None], strict=False):
        for name, x in zip(names, kind or (None, None), strict=True):
            assert made[f"{name}.ptr"] == (0 if x is None else x.data_ptr())
            if x is not None:
                assert [made[f"{name}.stride_{i}"] for i in range(x.dim())] == list(x.stride())


def test_a_backward_pass_makes_its_map_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both of its kernels read what one sheet wrote."""
    recorder, (q, k, v, dout) = Recorder(monkeypatch, KERNEL), CASE.inputs()
    out, lse = torch.zeros_like(q), torch.zeros(2, 4, 200)
    named = {"dout": dout, "out": out, "lse": lse, **passed(lists_of(CASE.drawn()))}
    recorder.launcher.make(("dq", "dk", "dv"), q, k, v, declared=named, intake=GRADIENTS_INTAKE)
    sent = {name: fields for name, _, fields in recorder.sent}
    assert list(sent)[0] == SHEET and len(sent) == 4
    of_map = {fields[f"{BLOCK_MAP}.ptr"] for fields in sent.values() if f"{BLOCK_MAP}.ptr" in fields}
    assert len(of_map) == 1 and 0 not in of_map
    gradients = [name for name in sent if name.endswith("_gradients")]
    assert len(gradients) == 2 and all(f"{BLOCK_MAP}.ptr" in sent[name] for name in gradients)


def test_maps_and_lists_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a signature of its own, whose addresses are those of the call."""
    recorder, (q, k, v, _) = Recorder(monkeypatch, KERNEL), CASE.inputs()
    first, second = CASE.drawn(seed=1), CASE.drawn(seed=2)
    for kept in (first, second):
        recorder.run(q, k, v, **passed(kept))
        assert recorder.sent[-1][2][f"{BLOCK_MAP}.ptr"] == kept.data_ptr()
        counts, indices = lists_of(kept)
        recorder.run(q, k, v, **passed((counts, indices)))
        assert recorder.sent[-2][2][f"{BLOCK_LISTS[0]}.ptr"] == counts.data_ptr()
        assert recorder.sent[-2][2][f"{BLOCK_LISTS[1]}.ptr"] == indices.data_ptr()
    assert [name == SHEET for name, *_ in recorder.sent] == [False, True, False] * 2
