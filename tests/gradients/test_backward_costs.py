"""What a backward pass costs, told before it is done: FLOPs, seconds on the CPU, and bytes of memory."""

import logging
from dataclasses import replace

import pytest
import torch

from attngen.bind import bind, check_arguments
from attngen.plan import GRADIENTS_INTAKE, in_f32
from attngen.simulate import launches
from attngen.simulate.traffic import Traffic, executed_flops
from attngen.spec_call import GRADIENTS
from tests.gradients.backward_cases import BackwardCase, run_backward

COUNTED = (
    BackwardCase("causal", lengths=(130, 70), heads=(6, 2)),
    BackwardCase("window(40, 3)", lengths=(150, 150)),
    BackwardCase("causal and document(doc)", lengths=(130, 130), heads=(4, 2)),
    BackwardCase("kv_idx <= q_idx * h and kv_idx < lens[b]", lengths=(90, 130), heads=(4, 2)),
    BackwardCase("causal", lengths=(70, 130), head_dim=(192, 160)),
)


@pytest.mark.parametrize("case", COUNTED, ids=str)
def test_flops_are_known_beforehand(case: BackwardCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """The formula gives, kernel by kernel, what running the programs of forward and backward counts."""
    counted: dict[str, tuple[int, int]] = {}
    run_launch = launches._launch

    def watched(run: launches.KernelRun, launch: launches.Launch, lockstep: int) -> None:
        run.device.traffic = Traffic()
        run_launch(run, launch, lockstep)
        counted[run.plan.schedule] = run.device.traffic.flops, executed_flops(run.plan, run.sizes)

    monkeypatch.setattr(launches, "_launch", watched)
    run_backward(case, case.kernel("sm_90a"))
    assert len(counted) == (4 if case.head_dim == (192, 160) else 3)
    assert all(executed == known > 0 for executed, known in counted.values()), counted


def test_a_long_backward_pass_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It says what all kernels of the pass will cost, as the forward does; here with the measured second made short."""
    monkeypatch.setattr("attngen.simulate.progress.SAMPLE", 0.05)
    monkeypatch.setattr("attngen.simulate.progress.LONG", 0.1)
    case = BackwardCase("causal", lengths=(600, 600), heads=(8, 8), head_dim=(64, 64))
    kernel = case.kernel("simulator")
    (q, k, v, dout), _ = case.inputs_on("cpu")
    rows = torch.zeros(2, 8, 600)
    with caplog.at_level(logging.WARNING, "attngen.simulate.progress"):
        kernel.backward(dout, q, k, v, dout, rows)
    (record,) = caplog.records
    pairs = 2 * 8 * (10 * 11 / 2) * 64 * 64  # of 64 rows and 64 keys, on and below the diagonal
    assert record.args and record.args[0] == 7 * 2 * pairs * 64 / 1e9  # type: ignore[index]


@pytest.mark.parametrize("heads", [(4, 4), (8, 1)])
@pytest.mark.parametrize("head_dim", [32, 192])
def test_a_pass_takes_two_rows_of_memory_beside_its_gradients(head_dim: int, heads: tuple[int, int]) -> None:
    """D and lse in log2 units, f32, whatever the number of keys, the group and the head's width; nothing is zeroed."""
    case = BackwardCase("causal", lengths=(512, 2048), heads=heads, head_dim=(head_dim, head_dim))
    manifest = case.kernel("sm_90a").manifest
    drawn, _ = case.inputs_on("meta")
    q, k, v, dout = drawn
    rows = torch.empty(2, heads[0], 512, device="meta")
    named = {"dout": dout, "out": torch.empty_like(dout), "lse": rows}
    given = check_arguments(manifest, q, k, v, declared=named, intake=GRADIENTS_INTAKE)
    for wanted in (GRADIENTS, tuple(map(in_f32, GRADIENTS))):
        bound = bind(manifest, given, wanted, 132)
        assert set(bound.made) == {*wanted, "delta", "lse_log2"}
        assert bound.scratch.size_bytes == 2 * 4 * rows.numel()
        assert bound.kept.size_bytes == bound.zeroed.size_bytes == 0
    walked = replace(case, mask="causal and kv_idx % 3 != q_idx % 2").kernel("sm_90a").manifest
    assert bind(walked, given, GRADIENTS, 132).scratch.size_bytes == 2 * 4 * rows.numel()
