"""The properties of gradients by kernels on a GPU: those that the simulator is held to on random calls."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gpu.test_gradients_on_gpu import target
from tests.gradients.backward_cases import BackwardCase
from tests.gradients.gradient_properties import Inputs, Made, Subject
from tests.gradients.test_gradient_mutants import CASES

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]


@dataclass(frozen=True)
class OnGpu(Subject):
    """A call and its backward pass by kernels, of inputs that lie on the CPU and with results that do."""

    def __call__(self, case: BackwardCase, given: Inputs) -> Made:
        q, k, v, _ = on_gpu(given.tensors)
        kernel, named = case.kernel(target()), declared_on_gpu(given.declared)
        out, lse = kernel(q, k, v, case.scale, return_lse=True, **named)
        return Made(out.cpu(), lse.cpu(), *self.backward(case, given, out, lse))

    def backward(self, case: BackwardCase, given: Inputs, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        """The gradients of a call that gave out and lse, or would have."""
        q, k, v, dout, out, lse = on_gpu([*given.tensors, out, lse])
        dlse = None if given.dlse is None else given.dlse.cuda()
        kernel, named = case.kernel(target()), declared_on_gpu(given.declared)
        made = kernel.backward(dout, q, k, v, out, lse, dlse, softmax_scale=case.scale, **named)
        return tuple(x.cpu() for x in made)


def on_gpu(tensors: list[Tensor]) -> list[Tensor]:
    return [x.cuda() for x in tensors]


def declared_on_gpu(declared: Mapping[str, Any]) -> dict[str, Any]:
    return {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in declared.items()}


@pytest.mark.parametrize("inputs", ["bf16", "f16"])
@pytest.mark.parametrize("head_dim", [(64, 64), (128, 128), (192, 128)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_it_holds(name: str, head_dim: tuple[int, int], inputs: str) -> None:
    """On the calls that mutants are found by, with more rows: several blocks on either side."""
    check, case = CASES[name]
    rows, keys = case.lengths
    check(OnGpu(), replace(case, lengths=(rows + 128, keys), head_dim=head_dim, inputs=inputs))
