"""What 8-bit inputs cost: errors against fp64 attention on the inputs as they were before anything was rounded to e4m3.

One problem goes to a kernel of e4m3 inputs, to one with a scale per tensor and no Hadamard matrix, and to one of
bf16. Whether a kernel is right is for `attngen.check.judging`; nothing here is held to a bound, printed or timed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from attngen.api import resolve_arch
from attngen.check.judging import Inputs
from attngen.check.reference import attention_chunked
from attngen.errors import SpecError
from attngen.kernel import Kernel
from attngen.lower import lower
from attngen.spec import Spec
from attngen.torch_state import torch_defaults

SAMPLED_ROWS = 64
"""Queries, of every batch and head, that the reference is computed for: fp64 on all of them takes minutes at 64k."""
_FREE = {
    **{f"tile.{name}": "auto" for name in ("block_m", "block_n")},
    "schedule": {"kind": "auto"},
}
"""What another format may want otherwise."""


def per_tensor(spec: Spec) -> Spec:
    """Change a spec to one scale for each of Q, K and V, as they are."""
    return spec.replace(
        {**_FREE, "precision.scales": "per_tensor", "precision.incoherent": "none", "precision.seed": 0}
    )


def in_bf16(spec: Spec) -> Spec:
    """Change a spec to bf16 inputs."""
    return spec.replace({**_FREE, "precision": {"inputs": "bf16", "output": spec.precision.output}})


def beside(kernel: Kernel) -> dict[str, Kernel]:
    """The kernel, by the name of its scales, one with a scale per tensor, and bf16's; those that are legal."""
    assert kernel.plan.quantizer is not None
    basis = "" if kernel.plan.quantizer.hadamard_seed is None else ", hadamard"
    found = {f"{kernel.plan.quantizer.scales}{basis}": kernel}
    for name, spec_of in (("per_tensor", per_tensor), ("bf16", in_bf16)):
        try:
            spec = spec_of(kernel.spec)
            found.setdefault(name, Kernel(spec, lower(spec, resolve_arch(spec, kernel.plan.arch.name))))
        except SpecError:
            continue
    return found


def sampled_rows(seqlen_q: int, count: int = SAMPLED_ROWS) -> Sequence[int]:
    """Up to that many queries, evenly spread, the first and the last among them."""
    if seqlen_q <= count:
        return range(seqlen_q)
    return [i * (seqlen_q - 1) // (count - 1) for i in range(count)]


@torch_defaults()
def rmse_of(
    kernels: Mapping[str, Kernel],
    inputs: Inputs,
    declared: Mapping[str, Any] | None = None,
    rows: Sequence[int] | None = None,
    *,
    relative: bool = False,
) -> dict[str, float]:
    """RMSE of each kernel's output on 16-bit inputs, over the rows that see a key.

    Args:
        kernels: by name, of one mask and score; the first one's mask and score are the reference's.
        inputs: q, k and v, bf16.
        declared: what calls pass for what the specs declare.
        rows: queries to compare; `sampled_rows` where None.
        relative: divide by the root of the mean square of the reference.
    """
    q, k, v = inputs
    spec, passed = next(iter(kernels.values())).spec, dict(declared or {})
    rows = sampled_rows(q.shape[1]) if rows is None else rows
    about: dict[str, Any] = {"rows": rows, "score": spec.score_expr, "declared": passed}
    ref, lse = attention_chunked(q, k, v, spec.mask_expr, **about)
    visible = lse.isfinite().transpose(1, 2)
    index = torch.tensor(list(rows), dtype=torch.int64, device=q.device)
    size = _root_mean_square(ref[visible]) if relative else 1.0
    found = {}
    for name, kernel in kernels.items():
        out = kernel(q, k, v, **passed)
        assert isinstance(out, torch.Tensor)  # of a call that asks for no lse
        error = out.index_select(1, index).double() - ref
        found[name] = _root_mean_square(error[visible]) / size if size else 0.0
    return found


def _root_mean_square(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0
