"""The torch reference of quantisation against cases worked out by hand."""

import math

import pytest
import torch

from attngen.quantize import (
    FRAGMENT_ORDER,
    SCALE_KINDS,
    SMALLEST_AMAX,
    ScaleKind,
    dequantize,
    pack_values,
    quantize,
    signs,
    unpack_values,
)

INF, NAN = math.inf, math.nan


def ramp(batch: int, seqlen: int, heads: int, dim: int = 16) -> torch.Tensor:
    """A tensor whose granules all have different maxima."""
    return torch.arange(1, batch * seqlen * heads * dim + 1).reshape(batch, seqlen, heads, dim).float()


@pytest.mark.parametrize("scales", SCALE_KINDS)
def test_descales_of_each_granule(scales: ScaleKind) -> None:
    """Each descale is the largest magnitude of its own granule over 448; query heads of a group share one per head.

    A block of V has the next power of two.
    """
    q, k, v = -ramp(2, 130, 4), ramp(2, 200, 2), ramp(2, 200, 2, 32)
    found = quantize(q, k, v, scales)
    for x, descale, block in ((q, found.q_descale, 64), (k, found.k_descale, 128), (v, found.v_descale, 128)):
        per_rows = descale.dim() == 3
        for b, h, row in ((0, 0, 0), (1, 1, 63), (1, 0, 64), (0, x.shape[2] - 1, 128), (1, 1, 129)):
            rows = slice(row // block * block, row // block * block + block)
            if scales == "per_token" and x is not v:
                granule, at = x[b, row, h], (b, h, row)
            elif per_rows:
                granule, at = x[b, rows, h], (b, h, row // block)
            elif scales == "per_head":
                group = x.shape[2] // 2
                granule, at = x[b, :, h // group * group : (h // group + 1) * group], (b, h // group)
            else:
                granule, at = x, (0, 0)
            exact = granule.abs().max() / 448
            assert descale[at] == (2 ** exact.log2().ceil() if per_rows and x is v else exact)
    if scales == "per_tensor":
        assert found.q_descale.shape == (2, 2) and found.q_descale.unique().numel() == 1


@pytest.mark.parametrize("scales", SCALE_KINDS)
def test_values_are_near(scales: ScaleKind) -> None:
    """What is read back is off by half a unit in the last place (2^-4 of the value), or of the smallest e4m3."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 150, heads, 64, generator=generator) for heads in (6, 2, 2))
    found = quantize(q, k, v, scales)
    descales = found.q_descale, found.k_descale, found.v_descale
    for x, back, descale in zip((q, k, v), dequantize(found), descales, strict=True):
        assert ((back - x).abs() <= x.abs() * 2**-4 * 1.0001 + descale.max() * 2**-10).all()
        assert back.abs().sum() > 0


def test_ties_go_to_even_and_ends_saturate() -> None:
    """With a descale of 1, 17 and 19 are halfway between e4m3 numbers; infinity ends at 448 and NaN stays."""
    q = torch.zeros(1, 1, 1, 16)
    q[..., :7] = torch.tensor([448, 17, 19, -17, INF, -INF, NAN])
    found = quantize(q, q, q, "per_tensor")
    assert found.q_descale.item() == 1
    back = dequantize(found)[0].flatten().tolist()
    assert back[:6] == [448, 16, 20, -16, 448, -448] and math.isnan(back[6])
    assert found.q.view(torch.uint8).flatten()[6] == 0x7F


@pytest.mark.parametrize("scales", SCALE_KINDS)
def test_zeros_and_tiny_numbers(scales: ScaleKind) -> None:
    """A granule of zeros has descale 1; the smallest numbers neither divide by zero nor become NaN."""
    zeros = torch.zeros(1, 70, 2, 64)
    found = quantize(zeros, zeros, zeros, scales, hadamard_seed=1)
    assert all((x == 1).all() for x in (found.q_descale, found.k_descale, found.v_descale))
    assert not found.q.float().any() and not found.v.view(torch.uint8).any()
    tiny = torch.full((1, 70, 2, 64), 2.0**-133).bfloat16()
    found = quantize(tiny, tiny, tiny, scales)
    assert (found.k_descale == SMALLEST_AMAX / 448).all()
    assert dequantize(found)[2].isfinite().all()


@pytest.mark.parametrize("scales", SCALE_KINDS)
@pytest.mark.parametrize(
    "sizes", [(0, 2, 2, 3, 3), (1, 2, 2, 0, 3), (1, 2, 2, 3, 0), (1, 0, 0, 3, 3)], ids=str
)
def test_empty_tensors(sizes: tuple[int, ...], scales: ScaleKind) -> None:
    """No batch, rows or heads: shapes are as documented, and a head without rows has descale 1."""
    batch, heads, heads_kv, seqlen_q, seqlen_k = sizes
    k = torch.ones(batch, seqlen_k, heads_kv, 64)
    found = quantize(torch.ones(batch, seqlen_q, heads, 64), k, k, scales, hadamard_seed=3)
    assert found.v.shape == (batch, heads_kv, 64, 128 if seqlen_k else 0)
    if scales == "per_head":
        assert found.v_descale.shape == (batch, heads_kv)
        assert seqlen_k or (found.v_descale == 1).all()


def test_the_hadamard_matrix_keeps_products() -> None:
    """Q K^T is the same in f64 tolerance of f32, an outlier is spread over its row, and NaN or infinity over theirs."""
    q, k = (torch.randn(1, 5, 1, 128, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    q[0, 2, 0, 9] = 1000
    plain, spread = quantize(q, k, k, "per_token"), quantize(q, k, k, "per_token", hadamard_seed=5)
    expected = torch.einsum("bqhd,bkhd->bqk", q, k)
    errors = [
        (torch.einsum("bqhd,bkhd->bqk", *dequantize(x)[:2]) - expected).abs()[0, [0, 1, 3, 4]].max()
        for x in (plain, spread)
    ]
    assert max(errors) < 2 and expected.abs().max() > 20  # 128 products, each off by 2^-4 at most
    assert spread.q_descale[0, 0, 2] * 448 < 1000 / math.sqrt(128) * 1.5
    q[0, 0, 0, 3], q[0, 1, 0, 4] = INF, NAN
    wrong = quantize(q, k, k, "per_token", hadamard_seed=5)
    back = dequantize(wrong)[0]
    assert back[0, :2].isnan().all() and back[0, 2:].isfinite().all()
    assert wrong.q_descale[0, 0, :2].tolist() == [1, 1]


def test_the_hadamard_matrix_by_its_definition() -> None:
    """Entry (i, j) is the parity of the common bits of i and j, over sqrt(d), after the signs of the columns."""
    dim, seed = 64, 12
    parity = torch.tensor([[(-1) ** (i & j).bit_count() for j in range(dim)] for i in range(dim)])
    matrix = torch.tensor(signs(seed, dim))[:, None] * parity / math.sqrt(dim)
    x = torch.eye(dim)[None, :, None, :]
    found = quantize(
        x, x, x, "per_token", hadamard_seed=seed
    )  # entries of one magnitude: exact but for descales
    assert torch.allclose(dequantize(found)[0][0, :, 0], matrix, rtol=1e-6)


def test_signs_are_splitmix64() -> None:
    """The first outputs of splitmix64 of seed 0 are known; a bit that is set is -1."""
    outputs = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4)
    bits = [-1 if output >> bit & 1 else 1 for output in outputs for bit in range(64)]
    assert list(signs(0, 128)) == bits


def test_fragment_order_by_the_instructions() -> None:
    """Where the accumulator of m64nNk32 leaves keys, and where the A operand of 8-bit elements wants them.

    Source: PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk32": D of lane q of a quad has columns 8 j + 2 q and
    the next; A has 4 q .. 4 q + 3, and 16 more.
    """
    held = {q: [8 * j + 2 * q + e for j in range(4) for e in range(2)] for q in range(4)}
    wanted = {q: [16 * half + 4 * q + e for half in range(2) for e in range(4)] for q in range(4)}
    key_at = {place: key for q in range(4) for place, key in zip(wanted[q], held[q], strict=True)}
    assert [key_at[place] for place in range(32)] == [*FRAGMENT_ORDER, *(16 + key for key in FRAGMENT_ORDER)]


@pytest.mark.parametrize("seqlen", [0, 1, 16, 127, 128, 129, 300])
def test_packing_round_trip(seqlen: int) -> None:
    """Keys come back where they were; what is padded is zero, and rows are whole blocks."""
    v = torch.randint(0, 256, (2, seqlen, 3, 32), dtype=torch.uint8).view(torch.float8_e4m3fn)
    packed = pack_values(v)
    assert packed.shape == (2, 3, 32, -(-seqlen // 128) * 128) and packed.is_contiguous()
    assert torch.equal(unpack_values(packed, seqlen).view(torch.uint8), v.view(torch.uint8))
    for key, place in ((0, 0), (8, 2), (11, 7), (17, 17)):
        if key < seqlen:
            assert torch.equal(packed.view(torch.uint8)[..., place], v.view(torch.uint8)[:, key])
    whole = unpack_values(packed, packed.shape[-1]).view(torch.uint8)
    assert not whole[:, seqlen:].any()
