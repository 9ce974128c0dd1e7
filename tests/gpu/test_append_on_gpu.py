"""Appending to caches on a GPU: the bits of the CPU, in all memory; graphs, streams, far pages, decode."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu_kernels import wait_for_gpu

import attngen
from attngen.errors import ArgumentError
from tests.serving.append_cases import ALL_FORMATS, CASES, E4M3, PLACES, AppendCase, memory_of

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]


def takes_e4m3() -> bool:
    return torch.cuda.get_device_capability() >= (8, 9)


def on_gpu(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments on the GPU: views of as much memory as they are on the CPU, those of one memory of one there too."""
    memories: dict[int, torch.Tensor] = {}

    def moved(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(moved, x))
        if not isinstance(x, torch.Tensor):
            return x
        there = memories.setdefault(x.untyped_storage().data_ptr(), memory_of(x).cuda())
        view = torch.empty(0, dtype=x.dtype, device="cuda")
        return view.set_(there.untyped_storage(), x.storage_offset(), x.shape, x.stride())

    return {name: moved(x) for name, x in given.items()}


def assert_same_as_on_the_cpu(case: AppendCase) -> None:
    """All memory of the caches, and q, to the bit."""
    there = on_gpu(case.tensors)
    found = attngen.append(**there)
    wait_for_gpu()
    wanted = attngen.append(**case.tensors)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(memory_of(there[name]).cpu(), memory_of(case.tensors[name]))
    assert (found is None) == (wanted is None)
    assert found is None or wanted is None or torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_cases_that_were_met(case: AppendCase) -> None:
    """Numbers that lie, scales of heads, more rows than positions."""
    if case.cache == E4M3 and not takes_e4m3():
        pytest.skip("this GPU has no conversion to e4m3")
    assert_same_as_on_the_cpu(replace(case, seed=1))


@pytest.mark.parametrize("formats", ALL_FORMATS, ids=str)
def test_the_bits_of_the_cpu(formats: Any) -> None:
    """Every format and rotation; layouts, pages, strides, sequences and what they pass in turns."""
    new, cache, turns = formats
    if cache == E4M3 and not takes_e4m3():
        pytest.skip("this GPU has no conversion to e4m3")
    for seed, places in enumerate(PLACES):
        for is_ragged in (False, True):
            case = AppendCase(
                (3, 0, 40, 1) if is_ragged else (3,) * 5,
                is_ragged,
                heads=((4, 2), (16, 2), (3, 1), (1, 1))[seed],
                columns=((128, 128), (64, 8), (16, 64), (192, 128))[seed],
                page=(None, 1, 3, 16)[seed],
                room=(8, 60, 20, 4)[seed],
                layout=("nhd", "hnd")[is_ragged],
                places=places,
                new=new,
                cache=cache,
                rotation=None if turns is None else (((64, 32, 16, 192)[seed]), *turns),
                q_advances=seed % 2 == 0,
                has_index=is_ragged,
                has_leftpad=seed > 1,
                scales=("number", "all", "heads", "both")[seed],
                seed=seed,
            )
            assert_same_as_on_the_cpu(case)
            assert_same_as_on_the_cpu(replace(case, lies=True, seed=seed + 10))


def test_a_first_call_may_be_captured() -> None:
    """A graph of a step that counts on, replayed on another stream, appends key after key."""
    case = AppendCase((1,) * 4, heads=(8, 2), columns=(64, 64), page=8, room=10, new=torch.float16, cache=torch.float16,
                      rotation=(64, torch.float32, False), seed=4)  # fmt: skip
    given = case.tensors
    given["seqused_k"] = torch.tensor([0, 5, 17, 39], dtype=torch.int32)
    there = on_gpu(given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q = attngen.append(**there)
        there["seqused_k"].add_(1)
    stream = torch.cuda.Stream()
    draw = torch.Generator().manual_seed(1)
    for _ in range(60):  # the fourth has room for 41 more: what comes then is left out
        for name in ("k_new", "v_new", "q"):
            given[name].copy_(torch.randn(given[name].shape, generator=draw))
        with torch.cuda.stream(stream):
            for name in ("k_new", "v_new", "q"):
                there[name].copy_(given[name])
            graph.replay()
        wanted = attngen.append(**given)
        given["seqused_k"] += 1
        stream.synchronize()
        assert wanted is not None and torch.equal(q.cpu(), wanted)
    for name in ("k_cache", "v_cache", "seqused_k"):
        assert torch.equal(there[name].cpu().view(torch.uint8), given[name].view(torch.uint8))


def test_pages_lie_more_than_2_31_elements_apart() -> None:
    """A cache of two layers page by page, of which only the last page is appended to: offsets are of 64 bits."""
    pages = 2**31 // (2 * 16 * 8 * 64) + 2
    both = torch.zeros(pages, 2, 16, 8, 64, dtype=torch.bfloat16, device="cuda")
    assert both.numel() > 2**31
    k = torch.ones(1, 2, 8, 64, dtype=torch.bfloat16, device="cuda")
    table = torch.tensor([[0, pages - 1]], dtype=torch.int32, device="cuda")
    used = torch.tensor([30], dtype=torch.int32, device="cuda")
    attngen.append(k, k + 1, both[:, 0], both[:, 1], seqused_k=used, block_table=table)
    wait_for_gpu()
    last = both[pages - 1].float()
    assert (last[0, 14:] == 1).all() and (last[1, 14:] == 2).all()
    assert both.count_nonzero() == 2 * k.numel()


def test_decode_step_by_step_is_causal_attention() -> None:
    """Append, and attend to what the cache then holds, with no wait between: each launch sees what came before."""
    draw = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(4, 40, heads, 64, generator=draw, device="cuda").half() for heads in (8, 2, 2))
    spec = {"problem": {"head_dim": 64, "keys": "padded"}, "precision": {"inputs": "f16"}, "mask": "causal"}
    kernel = attngen.compile(spec)
    caches = [torch.full((4, 48, 2, 64), torch.nan, device="cuda").half() for _ in "kv"]
    used, steps = torch.zeros(4, dtype=torch.int32, device="cuda"), []
    for i in range(40):
        row = slice(i, i + 1)
        attngen.append(k[:, row], v[:, row], *caches, seqused_k=used)
        used = used + 1
        steps.append(kernel(q[:, row], *caches, seqused_k=used))
    wait_for_gpu()
    assert torch.equal(caches[0][:, :40], k) and torch.equal(caches[1][:, :40], v)
    assert all(x[:, 40:].isnan().all() for x in caches)
    wanted = attngen.attention(q, k, v, "causal")
    torch.testing.assert_close(torch.cat(steps, 1), wanted, rtol=2**-9, atol=2e-3)


def test_what_a_gpu_does_not_take_is_refused() -> None:
    """Rows off 16 bytes, tensors on two devices."""
    given = on_gpu(AppendCase().tensors)
    wide = torch.zeros(3, 2, 2, 20, device="cuda").bfloat16()
    for changes, said in (
        ({"k_new": wide[..., :16]}, "k_new: got stride 20 in dimension 2"),
        ({"v_cache": given["v_cache"].cpu()}, "v_cache: got device cpu, expected cuda:0"),
        ({"seqused_k": given["seqused_k"].cpu()}, r"seqused_k: got torch.int32 of shape \(3,\) on cpu"),
    ):
        with pytest.raises(ArgumentError, match=f"argument {said}"):
            attngen.append(**{**given, **changes})


def test_a_known_call_is_looked_at_where_it_lies() -> None:
    """Of one signature: other memory, K and V side by side, rows off 16 bytes, shared memory, gradients."""
    given = on_gpu(AppendCase(columns=(16, 16), new=torch.float16, rotation=None).tensors)
    memory = torch.zeros(19, 2, 4, 2, 16, device="cuda").bfloat16()
    given |= {"k_cache": memory[:, 0], "v_cache": memory[:, 1]}
    for _ in range(3):
        memory.zero_()
        attngen.append(**given)
        wait_for_gpu()
        assert memory.any(-1).sum() == 2 * 3 * 2 * 2
    other = torch.zeros_like(memory)
    attngen.append(**{**given, "k_cache": other[:, 0], "v_cache": other[:, 1]})
    wait_for_gpu()
    assert torch.equal(other, memory)
    odd = torch.zeros(given["k_new"].untyped_storage().nbytes() // 2 + 8, device="cuda").half()
    off_16 = odd[1:].as_strided(given["k_new"].shape, given["k_new"].stride())
    for changes, said in (
        ({"k_new": off_16}, "argument k_new: got an address that is 2 bytes past"),
        ({"v_cache": memory[:, 0]}, "argument k_cache: got memory shared with v_cache"),
        (
            {"k_new": given["k_new"].detach().requires_grad_()},
            "argument k_new: got a tensor that requires grad",
        ),
    ):
        with pytest.raises(ArgumentError, match=said):
            attngen.append(**{**given, **changes})
