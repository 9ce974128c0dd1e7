"""Parts to merge, as hypothesis draws them, and what comes of them in f64."""

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("bshd", "bhsd", "ragged")


@dataclass(frozen=True)
class MergeCase:
    """Parts of drawn sizes; `empties` says of how many in a hundred rows a part has no keys.

    Such a row has NaN for an output, and for its lse an infinity, of either sign.
    """

    layout: str
    dtype: torch.dtype
    parts: int
    sizes: tuple[int, int, int, int]
    empties: int
    spread: float
    sink: torch.dtype | None
    seed: int

    @property
    def call_layout(self) -> str:
        """What a call says."""
        return "bhsd" if self.layout == "bhsd" else "bshd"

    def parts_and_sink(self) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
        """Outputs, lses, and the sink, of strides of all kinds."""
        draw = torch.Generator().manual_seed(self.seed)
        outs, lses = zip(*(self._part(number, draw) for number in range(self.parts)), strict=True)
        heads = self.sizes[2]
        sink = None if self.sink is None else (torch.randn(heads, 3, generator=draw) * 4).to(self.sink)[:, 1]
        return list(outs), list(lses), sink

    def _part(self, number: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        batch, seqlen, heads, columns = self.sizes
        shape = {
            "bshd": (batch, seqlen, heads, columns),
            "bhsd": (batch, heads, seqlen, columns),
            "ragged": (batch * seqlen, heads, columns),
        }[self.layout]
        of_lse = (heads, batch * seqlen) if self.layout == "ragged" else (batch, heads, seqlen)
        lse = torch.randn(of_lse, generator=draw) * self.spread
        is_empty = torch.rand(of_lse, generator=draw) < self.empties / 100
        lse[is_empty] = math.inf if number % 2 else -math.inf
        out = torch.randn(shape, generator=draw)
        in_rows = is_empty if self.layout == "bhsd" else is_empty.transpose(-1, -2)
        out[in_rows] = math.nan
        if number % 3:  # a slice of something larger
            out = torch.cat((out, out), -1)[..., columns:]
            lse = lse.transpose(-1, -2).contiguous().transpose(-1, -2)
        return out.to(self.dtype), lse


merge_cases = st.builds(
    MergeCase,
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    parts=st.sampled_from((1, 2, 3, 4, 5, 9, 32, 33, 70)),
    sizes=st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(1, 3), st.sampled_from((8, 24, 64))),
    empties=st.sampled_from((0, 30, 80, 100)),
    spread=st.sampled_from((0.0, 1.0, 30.0, 1e4)),
    sink=st.sampled_from((None, *DTYPES)),
    seed=st.integers(0, 1000),
)


def merged_in_f64(
    outs: list[Tensor], lses: list[Tensor], sink: Tensor | None, layout: str
) -> tuple[Tensor, Tensor]:
    """The sum over parts of e^lse out over that of e^lse, by torch's own log-sum-exp of f64."""
    natural = torch.stack(lses).double()
    natural[natural == math.inf] = -math.inf
    terms = natural
    if sink is not None:
        terms = torch.cat((natural, sink.double().unsqueeze(-1).expand_as(natural[:1])))
    lse = terms.logsumexp(0)
    shares = (natural - lse).exp().where(natural > -math.inf, torch.zeros((), dtype=torch.float64))
    rows = [x.double() if layout == "bhsd" and x.dim() == 4 else x.double().transpose(-3, -2) for x in outs]
    out = sum(share.unsqueeze(-1) * x.nan_to_num() for share, x in zip(shares, rows, strict=True))
    return (out if layout == "bhsd" and outs[0].dim() == 4 else out.transpose(-3, -2)), lse


def assert_near(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    """Out is within two roundings of its type and of what f32 sums lose; lse within those of f32, infinities equal.

    An exponent of size e, rounded to f32 in log2 units, puts 2^-23 e into a weight, of which e < 40 leaves anything.
    """
    (out, lse), (exact, exact_lse) = found, wanted
    of_type = torch.finfo(out.dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=of_type, atol=max(of_type / 8, 2e-5))
    torch.testing.assert_close(lse.double(), exact_lse, rtol=2**-22, atol=2e-6)
