"""Rows of heads of any width, made such as kernels read them."""

import torch
from torch.nn.functional import pad

from attngen.bind import check_plain
from attngen.errors import ArgumentError

NARROWEST, WIDEST, STEP = 32, 256, 8
"""Columns of a head for which there are kernels on GPUs."""
CACHE_TYPE, CACHE_STEP = torch.float8_e4m3fn, 16
"""Of keys and values of 8 bits, and of which number their columns are a multiple."""


def fit_heads(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None,
    takes_e4m3: bool = False,
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], float | None]:
    """Pad heads with columns of 0, which change no product, and copy what has no contiguous columns.

    Args:
        q: (..., head_dim), f16, bf16, or f32 on the CPU.
        k: (..., head_dim).
        v: (..., head_dim_v), whose columns out is to have.
        softmax_scale: of the call; None for 1/sqrt(head_dim) of the heads as they are passed.
        takes_e4m3: k and v may be of e4m3, and are then as kernels read them.

    Returns:
        The tensors, themselves where kernels read them as they are, and the scale, None where nothing was padded and
        None was passed.

    Raises:
        ArgumentError: no tensor of a dense layout, no columns or more than `WIDEST`, those of k other than those of q,
            or a type for which there is no kernel on that device.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_strided(name, x)
        dtypes = (torch.float16, torch.bfloat16, torch.float32)[: 3 if x.device.type == "cpu" else 2]
        if takes_e4m3 and name != "q" and x.dtype is CACHE_TYPE:
            _check_cache(name, x)
        elif x.dtype not in dtypes:
            raise ArgumentError(name, f"dtype {x.dtype}", " or ".join(map(str, dtypes)))
        columns = x.shape[-1] if x.dim() else 0
        if not 1 <= columns <= WIDEST:
            raise ArgumentError(name, f"head_dim {columns}", f"1 to {WIDEST}")
    columns = q.shape[-1]
    if k.shape[-1] != columns:
        raise ArgumentError("k", f"head_dim {k.shape[-1]}", f"{columns}, as q has")
    keys, values = (x if x.dtype is CACHE_TYPE else fit_columns(x) for x in (k, v))
    fitted = (fit_columns(q), keys, values)
    if softmax_scale is None and fitted[0].shape[-1] != columns:
        softmax_scale = columns**-0.5
    return fitted, softmax_scale


def _check_cache(name: str, x: torch.Tensor) -> None:
    """Refuse keys or values of e4m3 that kernels cannot read as they are: a cache is not copied for a call."""
    columns = x.shape[-1] if x.dim() else 0
    if columns < NARROWEST or columns % CACHE_STEP:
        must = f"a multiple of {CACHE_STEP} from {NARROWEST} on, of e4m3"
        raise ArgumentError(name, f"head_dim {columns}", must)


def check_strided(name: str, x: torch.Tensor) -> None:
    """Refuse what has no strides, by what it is; all else that a kernel refuses is left to its call.

    Raises:
        ArgumentError: x is no tensor, nested, sparse or quantised.
    """
    if not isinstance(x, torch.Tensor) or x.is_nested or x.layout is not torch.strided:
        check_plain(name, x)


def fit_columns(x: torch.Tensor) -> torch.Tensor:
    """A tensor padded with columns of 0 to as many as kernels read, and contiguous ones; itself where it is so."""
    columns = x.shape[-1]
    missing = max(NARROWEST, -(-columns // STEP) * STEP) - columns
    if missing:
        return pad(x, (0, missing))
    return x if x.stride(-1) == 1 else x.contiguous()
