"""What attngen.flash_attn may be asked: signatures as published, and every argument served or refused by its name."""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import attngen
from attngen import flash_attn
from attngen.flash_attn import version2, version3, version4
from attngen.flash_attn.attend import UNSERVED
from tests.faces.attention64 import draw, starts

FACES: dict[str, ModuleType] = {"2": version2, "3": version3, "4": version4}
FUNCTIONS = [
    pytest.param(function, id=f"{version}-{name}")
    for version, face in FACES.items()
    for name, function in vars(face).items()
    if name.startswith("flash_attn_")
]

PUBLISHED = {
    (
        version2,
        "flash_attn_func",
    ): "q k v dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic"
    " return_attn_probs",
    (
        version2,
        "flash_attn_kvpacked_func",
    ): "q kv dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs",
    (
        version2,
        "flash_attn_qkvpacked_func",
    ): "qkv dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs",
    (
        version2,
        "flash_attn_varlen_func",
    ): "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p"
    " softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs block_table",
    (
        version2,
        "flash_attn_varlen_kvpacked_func",
    ): "q kv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p"
    " softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs",
    (
        version2,
        "flash_attn_varlen_qkvpacked_func",
    ): "qkv cu_seqlens max_seqlen dropout_p softmax_scale causal window_size"
    " softcap alibi_slopes deterministic return_attn_probs",
    (
        version2,
        "flash_attn_with_kvcache",
    ): "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx"
    " cache_leftpad block_table softmax_scale causal window_size softcap rotary_interleaved alibi_slopes num_splits"
    " return_softmax_lse",
    (version3, "flash_attn_func"): "q k v softmax_scale causal qv q_descale k_descale v_descale window_size"
    " attention_chunk softcap num_splits pack_gqa deterministic sm_margin return_attn_probs",
    (
        version3,
        "flash_attn_qkvpacked_func",
    ): "qkv softmax_scale causal q_descale k_descale v_descale window_size"
    " attention_chunk softcap deterministic num_heads_q sm_margin return_attn_probs",
    (
        version3,
        "flash_attn_varlen_func",
    ): "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k seqused_q seqused_k"
    " softmax_scale causal qv q_descale k_descale v_descale window_size attention_chunk softcap num_splits pack_gqa"
    " deterministic sm_margin return_attn_probs",
    (
        version3,
        "flash_attn_with_kvcache",
    ): "q k_cache v_cache k v qv rotary_cos rotary_sin cache_seqlens cache_batch_idx"
    " cache_leftpad page_table cu_seqlens_q cu_seqlens_k_new max_seqlen_q rotary_seqlens q_descale k_descale v_descale"
    " softmax_scale causal window_size attention_chunk softcap rotary_interleaved scheduler_metadata num_splits"
    " pack_gqa sm_margin return_softmax_lse",
    (
        version4,
        "flash_attn_func",
    ): "q k v qv gather_kv_indices softmax_scale causal window_size learnable_sink softcap"
    " num_splits pack_gqa deterministic score_mod score_mod_bwd mask_mod aux_tensors aux_scalars block_sparse_tensors"
    " block_sparse_tensors_bwd return_lse",
    (
        version4,
        "flash_attn_varlen_func",
    ): "q k v qv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k min_seqlen_k"
    " seqused_q seqused_k gather_kv_indices page_table softmax_scale causal window_size learnable_sink softcap"
    " num_splits pack_gqa deterministic score_mod score_mod_bwd mask_mod block_sparse_tensors aux_tensors aux_scalars"
    " return_lse scheduler_metadata seqlen_k_per_split disable_scheduler_metadata",
}
"""Parameters of flash_attn 2.8.4, flash_attn_interface and flash_attn.cute as of commit 0251105."""
DEFAULTS = {
    "dropout_p": 0.0, "softmax_scale": None, "causal": False, "softcap": 0.0, "deterministic": False,
    "attention_chunk": 0, "pack_gqa": None, "sm_margin": 0, "return_attn_probs": False, "return_lse": False,
    "return_softmax_lse": False, "rotary_interleaved": True, "disable_scheduler_metadata": False,
}  # fmt: skip


@pytest.mark.parametrize("face, name", PUBLISHED, ids=lambda each: getattr(each, "__name__", each))
def test_signatures_are_those_that_are_published(face: ModuleType, name: str) -> None:
    """Names, order, and defaults, by which callers find out what they may pass."""
    parameters = inspect.signature(getattr(face, name)).parameters
    assert list(parameters) == PUBLISHED[face, name].split()
    for each in parameters.values():
        none = (None, None) if face is version4 else (-1, -1)
        splits = 0 if name.endswith("kvcache") else 1
        expected = {**DEFAULTS, "window_size": none, "num_splits": splits}.get(each.name)
        assert each.default is inspect.Parameter.empty or each.default == expected, each.name


def test_the_package_has_the_functions_of_flash_attn_2() -> None:
    """So that one line of imports changes."""
    for face, name in PUBLISHED:
        assert face is not version2 or getattr(flash_attn, name) is getattr(version2, name)


def arguments(function: Callable[..., Any]) -> dict[str, Any]:
    """What a function needs at least."""
    q, k, v = draw((1, 4, 2, 32), (1, 4, 2, 32), (1, 4, 2, 32))
    given = {"q": q, "k": k, "v": v, "k_cache": k, "v_cache": v, "kv": torch.stack([k, v], 2)}
    given["qkv"] = torch.stack([q, k, v], 2)
    name = function.__name__
    if "varlen" in name:
        given = {each: x[0] for each, x in given.items()}
        given |= dict.fromkeys(("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k"), starts(4))
        given |= dict.fromkeys(("max_seqlen", "max_seqlen_q", "max_seqlen_k"), 4)
    elif "kvcache" in name:
        del given["k"], given["v"]
    return {each: given[each] for each in inspect.signature(function).parameters if each in given}


SERVED = {
    *(
        "softmax_scale",
        "causal",
        "window_size",
        "softcap",
        "alibi_slopes",
        "attention_chunk",
        "learnable_sink",
    ),
    *("seqused_q", "seqused_k", "cache_seqlens", "cache_batch_idx", "cache_leftpad", "k", "v", "num_heads_q"),
    *("cu_seqlens_q", "max_seqlen_q", "block_sparse_tensors"),
    *("return_attn_probs", "return_lse", "return_softmax_lse"),
    *("block_table", "page_table", "rotary_cos", "rotary_sin", "rotary_seqlens", "cu_seqlens_k_new"),
}
"""Arguments of which a test in test_flash_attn.py or test_flash_attn_caches.py shows what they do."""
FLAGS = {"deterministic", "rotary_interleaved", "disable_scheduler_metadata"}
WRONG: dict[str, Any] = {"dropout_p": 0.1, "num_splits": 3, "pack_gqa": True, "sm_margin": 8}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_argument_is_passed_over(function: Callable[..., Any]) -> None:
    """What is not served is refused by its name, and nothing is left out of both lists."""
    needed = arguments(function)
    expected = function(**needed)
    for name in set(inspect.signature(function).parameters) - set(needed) - SERVED:
        if name in FLAGS:
            for value in (True, False):
                found = function(**needed, **{name: value})
                pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (found, expected)), strict=True)
                assert all(x is y is None or torch.equal(x, y) for x, y in pairs)
            with pytest.raises(ValueError, match=f"argument {name}: got 3, expected True or False"):
                function(**needed, **{name: 3})
        else:
            assert name in UNSERVED
            with pytest.raises(ValueError, match=f"argument {name}: got ") as caught:
                function(**needed, **{name: WRONG.get(name, torch.zeros(1))})
            assert isinstance(caught.value, attngen.ArgumentError)
    with pytest.raises(TypeError, match="unexpected keyword argument 'alibi'"):
        function(**needed, alibi=None)


MISTAKES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "q: got dtype torch.float64": (
        version2.flash_attn_func,
        {"q": torch.zeros(1, 4, 2, 32, dtype=torch.float64)},
    ),
    "k: got head_dim 40, expected 32, as q has": (version3.flash_attn_func, {"k": torch.zeros(1, 4, 2, 40)}),
    "v: got head_dim 264, expected 1 to 256": (version2.flash_attn_func, {"v": torch.zeros(1, 4, 2, 264)}),
    "k: got list, expected a torch tensor": (version2.flash_attn_func, {"k": [1.0]}),
    "causal: got 1, expected True or False": (version2.flash_attn_func, {"causal": 1}),
    "window_size: got 3": (version2.flash_attn_func, {"window_size": 3}),
    r"window_size: got \(None, 3\)": (version2.flash_attn_func, {"window_size": (None, 3)}),
    "softcap: got -1.0, expected a number above 0": (version2.flash_attn_func, {"softcap": -1.0}),
    "alibi_slopes: got shape": (version2.flash_attn_func, {"alibi_slopes": torch.zeros(3)}),
    "alibi_slopes: got 3 dimensions": (version2.flash_attn_func, {"alibi_slopes": torch.zeros(1, 2, 1)}),
    "learnable_sink: got shape": (version4.flash_attn_func, {"learnable_sink": torch.zeros(3)}),
    "attention_chunk: got -1": (version3.flash_attn_func, {"attention_chunk": -1}),
    "return_attn_probs: got 1": (version3.flash_attn_func, {"return_attn_probs": 1}),
    "cu_seqlens_k: got nothing": (version2.flash_attn_varlen_func, {"cu_seqlens_k": None}),
    "qkv: got shape": (version2.flash_attn_qkvpacked_func, {"qkv": torch.zeros(1, 4, 2, 32)}),
    "num_heads_q: got 3": (
        version3.flash_attn_qkvpacked_func,
        {"qkv": torch.zeros(1, 4, 8, 32), "num_heads_q": 3},
    ),
    "k_cache: got 3 dimensions": (version2.flash_attn_with_kvcache, {"k_cache": torch.zeros(4, 2, 32)}),
    "v_cache: got torch.float16 on cpu, expected torch.float32": (
        version2.flash_attn_with_kvcache,
        {"v_cache": torch.zeros(1, 4, 2, 32, dtype=torch.float16)},
    ),
    "cu_seqlens_q: got int": (
        version3.flash_attn_with_kvcache,
        {"cu_seqlens_q": 3, "q": torch.zeros(4, 2, 32)},
    ),
    "v: got None": (version2.flash_attn_with_kvcache, {"k": torch.zeros(1, 1, 2, 32), "cache_seqlens": 2}),
    "cache_seqlens: got torch.int64": (
        version2.flash_attn_with_kvcache,
        {"cache_seqlens": torch.tensor([3])},
    ),
    "cache_leftpad: got torch.float32 of shape": (
        version2.flash_attn_with_kvcache,
        {"cache_leftpad": torch.zeros(1)},
    ),
    "q: got a tensor that requires grad": (
        version2.flash_attn_with_kvcache,
        {"q": torch.zeros(1, 4, 2, 32).requires_grad_()},
    ),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_told_by_the_names_of_the_call(message: str) -> None:
    """As ValueErrors: argument, what it is, what it must be; a cache is not written to."""
    function, wrong = MISTAKES[message]
    with pytest.raises(ValueError, match=f"argument {message}"):
        function(**arguments(function) | wrong)


def test_the_folder_for_hubs_is_a_kernel() -> None:
    """The `kernels` library loads it, and its functions are those of the package."""
    kernels = pytest.importorskip("kernels")
    module = kernels.get_local_kernel(Path(attngen.__file__).parents[1] / "examples/hub_kernel")
    assert all(getattr(module, name) is getattr(flash_attn, name) for name in flash_attn.__all__)
