"""The kernels that quantise for one kind of scale, behind a launcher, without the attention kernel."""

from dataclasses import dataclass

import torch

import attngen
from attngen.bind import operands_of
from attngen.plan import OPERANDS
from attngen.quantize import Operands, ScaleKind
from attngen.runtime import Launcher


def kernel_that_quantises(
    head_dims: tuple[int, int], scales: ScaleKind, seed: int | None, arch: str = "sm_90a"
) -> attngen.Kernel:
    """A kernel of e4m3 inputs; Q and K are multiplied by a Hadamard matrix where there is a seed."""
    basis = {} if seed is None else {"incoherent": "hadamard", "seed": seed}
    spec = {
        "problem": {"head_dim": {"qk": head_dims[0], "v": head_dims[1]}},
        "precision": {"inputs": "e4m3", "scales": scales, **basis},
    }
    return attngen.compile(spec, arch=arch)


@dataclass(frozen=True)
class Quantizing:
    """What calls begin with."""

    launcher: Launcher

    def quantize(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str = "bshd") -> Operands:
        """As `attngen.Kernel.quantize`."""
        return operands_of(self.launcher.manifest, self.launcher.make(OPERANDS, q, k, v, layout=layout))

    def pack_v(self, v: torch.Tensor, layout: str = "bshd") -> torch.Tensor:
        """V as the attention kernel reads it; beside a Q and a K of one head_dim that nobody reads."""
        manifest = self.launcher.manifest
        like = v if isinstance(v, torch.Tensor) and v.dim() == 4 else torch.empty(1, 1, 1, 1)
        rows = torch.zeros(*like.shape[:3], manifest.head_dim_qk, device=like.device).to(torch.float8_e4m3fn)
        (packed,) = self.launcher.make(("v",), rows, rows, v, layout=layout)
        return packed
