"""Quantisation of Q, K and V to e4m3, in torch: what CPU calls use, and what the emitted kernels are held against.

A real value is an e4m3 value times the descale of its granule, the set of elements that share one. With amax, the
largest finite magnitude of the granule, descale = amax / 448, and elements are multiplied by the reciprocal 448 / amax,
rounded to the nearest (ties to even), and end at +-448. So an infinity becomes +-448 and a NaN stays one. A granule of
zeros has descale 1; an amax below 448 * 2^-126 counts as that, so that both factors are normal numbers. A block of V
has the next power of two for its descale, and the reciprocal of that for its factor: P takes the descale up and, while
it stays a normal number of e4m3, loses no more than without. The Hadamard matrix has entries 1 and -1; 1/sqrt(head_dim)
is multiplied into the reciprocal. The emitted kernels compute the same in the same order: their bytes and descales are
equal, bit by bit.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from attngen.torch_state import torch_defaults

ScaleKind = Literal["per_tensor", "per_head", "per_block", "per_token"]
SCALE_KINDS: tuple[ScaleKind, ...] = ("per_tensor", "per_head", "per_block", "per_token")
DESCALES = ("q_descale", "k_descale", "v_descale")
"""Names of the descales: of a call's arguments beside e4m3 tensors, and of `Operands`' fields."""
E4M3_MAX = 448.0
P_LIFT = 8
"""Kernels round P to e4m3 where a row's maximum stands for 2^8; the format goes from 2^-6, its smallest normal number,
to 448."""
SMALLEST_AMAX = E4M3_MAX * 2.0**-126
Q_BLOCK, KEY_BLOCK = 64, 128
"""Rows of Q, and of K and V, that share a scale per block. V is padded to whole blocks of keys."""
HADAMARD_DIMS = (64, 128, 256)
"""Columns of Q and K that may be multiplied by a Hadamard matrix."""
FRAGMENT_ORDER = tuple(8 * (i // 2) + 2 * q + i % 2 for q in range(4) for i in range(4))
"""Which of 16 consecutive keys stands at each position of packed V.

Lane q of a quad holds keys 2q, 2q + 1, 8 + 2q and 9 + 2q of a row of P after the score GEMM, and the 8-bit A operand
wants four consecutive ones of it: in this order they are. Source: PTX ISA, "Register Fragments for
wgmma.mma_async.m64nNk32".
"""


@dataclass(frozen=True)
class Operands:
    """Q, K and V as the e4m3 kernels read them, all dense.

    Attributes:
        q: (batch, seqlen_q, num_heads_q, head_dim_qk), e4m3; times the Hadamard matrix where `hadamard`.
        k: (batch, seqlen_k, num_heads_kv, head_dim_qk), e4m3; likewise.
        v: (batch, num_heads_kv, head_dim_v, seqlen_pad), e4m3: transposed, keys in `FRAGMENT_ORDER`, seqlen_k rounded
            up to a multiple of 128 with zeros.
        q_descale: f32. Per tensor and per head (batch, num_heads_kv), where a group of query heads shares one, per
            tensor one number expanded; per block (batch, num_heads_q, seqlen_q / 64 rounded up); per token (batch,
            num_heads_q, seqlen_q).
        k_descale: like it, of num_heads_kv heads and seqlen_k rows, 128 in a block.
        v_descale: like k_descale, and per block where Q and K have theirs per token.
        scales: what shares a scale.
        hadamard: whether Q and K have been multiplied by the Hadamard matrix with signs.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_descale: torch.Tensor
    k_descale: torch.Tensor
    v_descale: torch.Tensor
    scales: ScaleKind
    hadamard: bool

    @property
    def seqlen_k(self) -> int:
        """Keys, before V is padded."""
        return self.k.shape[1]


@torch_defaults()
def quantize(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scales: ScaleKind,
    hadamard_seed: int | None = None,
    maxima: torch.Tensor | None = None,
) -> Operands:
    """Quantise attention's inputs; any device, any strides.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim_qk), bf16, f16 or f32.
        k: (batch, seqlen_k, num_heads_kv, head_dim_qk); num_heads_kv divides num_heads_q.
        v: (batch, seqlen_k, num_heads_kv, head_dim_v).
        scales: what shares a scale.
        hadamard_seed: multiply Q and K by the Hadamard matrix with the signs of this seed; not at all where None. What
            is not finite in the product is NaN.
        maxima: of `find_maxima`, found here where None.
    """
    num_heads_kv = k.shape[2]
    of_values: ScaleKind = "per_block" if scales == "per_token" else scales
    rows, factor = _in_basis(q, k, hadamard_seed)
    found = [None] * 3 if maxima is None else [largest.expand(k.shape[0], num_heads_kv) for largest in maxima]
    q8, q_descale = _quantized(rows[0], scales, Q_BLOCK, num_heads_kv, factor, amax=found[0])
    k8, k_descale = _quantized(rows[1], scales, KEY_BLOCK, num_heads_kv, factor, amax=found[1])
    v8, v_descale = _quantized(
        v.float(), of_values, KEY_BLOCK, num_heads_kv, by_powers=of_values == "per_block", amax=found[2]
    )
    return Operands(
        q8,
        k8,
        pack_values(v8),
        q_descale,
        k_descale,
        v_descale,
        scales,
        hadamard_seed is not None,
    )


@torch_defaults()
def find_maxima(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scales: ScaleKind, hadamard_seed: int | None = None
) -> torch.Tensor:
    """The largest finite magnitudes of Q, K and V, as they will be quantised, where a scale is a head's or a tensor's.

    Returns:
        f32: (3,) per tensor, (3, batch, num_heads_kv) per head; arguments as of `quantize`.
    """
    rows, _ = _in_basis(q, k, hadamard_seed)
    found = torch.stack([_amax(_magnitudes(x), scales, KEY_BLOCK, k.shape[2]) for x in (*rows, v.float())])
    return found[:, 0, 0] if scales == "per_tensor" else found


def _in_basis(q: torch.Tensor, k: torch.Tensor, seed: int | None) -> tuple[list[torch.Tensor], float]:
    """Q and K in f32, times the Hadamard matrix where there is a seed, and the factor that is left to do."""
    rows = [q.float(), k.float()]
    if seed is None:
        return rows, 1.0
    return [_hadamard(x, seed) for x in rows], q.shape[-1] ** -0.5


def _magnitudes(x: torch.Tensor) -> torch.Tensor:
    """Of what is finite; 0 of what is not."""
    return x.abs().masked_fill(~x.isfinite(), 0)


@torch_defaults()
def dequantize(operands: Operands) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The real values of Q, K (both still in the Hadamard basis, if they are) and V.

    Returns:
        f32, (batch, seqlen, heads, head_dim) each.
    """
    v = unpack_values(operands.v, operands.seqlen_k)
    return (
        operands.q.float() * _for_each_row(operands.q_descale, operands.q, Q_BLOCK),
        operands.k.float() * _for_each_row(operands.k_descale, operands.k, KEY_BLOCK),
        v.float() * _for_each_row(operands.v_descale, v, KEY_BLOCK),
    )


@torch_defaults()
def pack_values(v: torch.Tensor) -> torch.Tensor:
    """Lay e4m3 V out as the kernels read it.

    Args:
        v: (batch, seqlen_k, num_heads_kv, head_dim_v), e4m3.

    Returns:
        (batch, num_heads_kv, head_dim_v, seqlen_pad); see `Operands.v`.
    """
    batch, seqlen, heads, dim = v.shape
    padded = v.new_zeros(batch, heads, dim, -(-seqlen // KEY_BLOCK) * KEY_BLOCK, dtype=torch.uint8)
    padded[..., :seqlen] = v.view(torch.uint8).permute(0, 2, 3, 1)
    groups = padded.view(batch, heads, dim, padded.shape[-1] // 16, 16)[..., list(FRAGMENT_ORDER)]
    return groups.flatten(-2).view(torch.float8_e4m3fn)


@torch_defaults()
def unpack_values(v: torch.Tensor, seqlen: int) -> torch.Tensor:
    """Undo `pack_values`: (batch, seqlen, num_heads_kv, head_dim_v), e4m3."""
    keys = sorted(range(16), key=FRAGMENT_ORDER.__getitem__)  # where each key stands
    groups = v.view(torch.uint8).view(*v.shape[:3], v.shape[3] // 16, 16)
    rows = groups[..., keys].flatten(-2)[..., :seqlen]
    return rows.permute(0, 3, 1, 2).contiguous().view(torch.float8_e4m3fn)


def signs(seed: int, head_dim: int) -> tuple[int, ...]:
    """1 or -1 for each column: -1 where the bit is set of head_dim / 64 outputs of splitmix64, lowest bit first.

    Args:
        seed: its state at first, from 0 to 2^64 - 1.
        head_dim: a multiple of 64.

    Source: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014, with the constants of
    java.util.SplittableRandom.
    """
    found: list[int] = []
    for draw in range(1, head_dim // 64 + 1):
        z = (seed + draw * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
        found += [-1 if z >> bit & 1 else 1 for bit in range(64)]
    return tuple(found)


def _hadamard(x: torch.Tensor, seed: int) -> torch.Tensor:
    """x diag(signs) H, of entries 1 and -1, by butterflies over columns 1, 2, 4 ... apart, in f32."""
    dim = x.shape[-1]
    x = x * torch.tensor(signs(seed, dim), device=x.device, dtype=x.dtype)
    stride = 1
    while stride < dim:
        low, high = x.reshape(*x.shape[:3], dim // (2 * stride), 2, stride).unbind(-2)
        x = torch.stack((low + high, low - high), -2).flatten(-3)
        stride *= 2
    return x.masked_fill(~x.isfinite(), math.nan)


def _quantized(
    x: torch.Tensor,
    scales: ScaleKind,
    block: int,
    num_heads_kv: int,
    x_factor: float = 1.0,
    by_powers: bool = False,
    amax: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 values, and descales as of `Operands`, of x_factor times rows (batch, seqlen, heads, head_dim), f32.

    `by_powers`: descales are powers of two. `amax` is found where it is None.
    """
    amax = (_amax(_magnitudes(x), scales, block, num_heads_kv) if amax is None else amax) * x_factor
    amax = torch.where(amax == 0, E4M3_MAX, amax.clamp(min=SMALLEST_AMAX))
    # A tensor of 448: torch divides by a number, and a number by a tensor, by way of a reciprocal.
    most = torch.full_like(amax, E4M3_MAX)
    factor, descale = most / amax, amax / most
    if by_powers:
        descale = _next_power_of_two(descale)
        factor = torch.ones_like(descale) / descale
    return rounded_to_e4m3(x * _for_each_row(factor * x_factor, x, block)), descale


def rounded_to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """f32 as e4m3, to the nearest, as cvt.rn.satfinite gives it: values end at 448, a NaN has no sign."""
    values = x.clamp(-E4M3_MAX, E4M3_MAX)  # not all versions of torch end at 448
    return values.masked_fill(x.isnan(), math.nan).to(torch.float8_e4m3fn)


def _next_power_of_two(x: torch.Tensor) -> torch.Tensor:
    """The smallest that is not less than x: positive, normal f32."""
    bits = x.contiguous().view(torch.int32) + 0x7FFFFF & 0x7F800000
    return bits.view(torch.float32)


def _amax(x: torch.Tensor, scales: ScaleKind, block: int, num_heads_kv: int) -> torch.Tensor:
    """The largest of each granule of magnitudes (batch, seqlen, heads, head_dim), in the shape of descales."""
    batch, seqlen, heads, _ = x.shape
    rows = x.amax(-1).transpose(1, 2)  # (batch, heads, seqlen)
    if scales == "per_token":
        return rows
    if scales == "per_block":
        blocks = -(-seqlen // block)
        padded = torch.cat((rows, rows.new_zeros(batch, heads, blocks * block - seqlen)), -1)
        return padded.view(batch, heads, blocks, block).amax(-1)
    # A zero more, for where there are no rows.
    if scales == "per_tensor":
        return torch.cat((rows.flatten(), rows.new_zeros(1))).amax().expand(batch, num_heads_kv)
    groups = rows.reshape(batch, num_heads_kv, heads // max(1, num_heads_kv) * seqlen)
    return torch.cat((groups, groups.new_zeros(batch, num_heads_kv, 1)), -1).amax(-1)


def _for_each_row(scale: torch.Tensor, x: torch.Tensor, block: int) -> torch.Tensor:
    """Scales of granules, as of descales, for the rows of x: (batch, seqlen, heads, 1)."""
    _, seqlen, heads, _ = x.shape
    if scale.dim() == 2:
        group = heads // max(1, scale.shape[1])
        return scale.repeat_interleave(group, 1)[:, None, :, None]
    if scale.shape[2] != seqlen:
        scale = scale.repeat_interleave(block, 2)[..., :seqlen]
    return scale.transpose(1, 2)[..., None]
