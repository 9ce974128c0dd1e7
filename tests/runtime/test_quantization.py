"""What a kernel of e4m3 inputs may be called with, on the CPU: 16-bit tensors, operands, e4m3 tensors and descales."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import attngen
from attngen.quantize import SCALE_KINDS, Operands, ScaleKind, unpack_values

DESCALES = ("q_descale", "k_descale", "v_descale")


def kernel_of(scales: ScaleKind, incoherent: str = "none") -> attngen.Kernel:
    precision = {"inputs": "e4m3", "scales": scales, "incoherent": incoherent}
    spec = {"problem": {"head_dim": 64}, "precision": precision, "mask": "causal"}
    return attngen.compile({"target": "simulator", **spec})


def tensors(dtype: torch.dtype = torch.bfloat16, layout: str = "bshd") -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 70, 4, 64), (2, 140, 2, 64), (2, 140, 2, 64))
    made = tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return made if layout == "bshd" else tuple(x.transpose(1, 2).contiguous() for x in made)


def passed(operands: Operands, layout: str = "bshd") -> dict[str, Any]:
    """The operands as e4m3 tensors of a layout, V unpacked, with their descales."""
    rows = (operands.q, operands.k, unpack_values(operands.v, operands.seqlen_k))
    q, k, v = rows if layout == "bshd" else (x.transpose(1, 2).contiguous() for x in rows)
    return {"q": q, "k": k, "v": v, "layout": layout, **{name: getattr(operands, name) for name in DESCALES}}


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("scales", SCALE_KINDS)
def test_all_ways_to_call_are_the_same(scales: ScaleKind, layout: str) -> None:
    """The call quantises, or has been given operands, or e4m3 tensors: equal bits."""
    kernel = kernel_of(scales)
    q, k, v = tensors(layout=layout)
    operands = kernel.quantize(q, k, v, layout)
    out, lse = kernel(q, k, v, return_lse=True, layout=layout)
    assert out.shape == q.shape and out.dtype == torch.bfloat16 and out.abs().max() > 0.1
    for again in (
        kernel(operands, return_lse=True, layout=layout),
        kernel(**passed(operands, layout), return_lse=True),
    ):
        assert torch.equal(again[0], out) and torch.equal(again[1], lse)


def test_f16_is_quantised_too() -> None:
    """Of both 16-bit formats the same values give the same operands."""
    kernel = kernel_of("per_block", "hadamard")
    q, k, v = (x.half() for x in tensors())
    expected = kernel(*(x.bfloat16() for x in (q, k, v)))
    assert torch.allclose(kernel(q, k, v).float(), expected.float(), atol=0.02)


def test_the_order_of_layouts_is_the_calls() -> None:
    """Operands do not remember a layout: each call says the one it wants its output in."""
    kernel = kernel_of("per_block")
    operands = kernel.quantize(*tensors(layout="bhsd"), layout="bhsd")
    assert torch.equal(kernel(operands), kernel(operands, layout="bhsd").transpose(1, 2))


def test_one_descale_stands_for_a_tensor() -> None:
    """With scales per tensor a descale of one element is every head's; (batch, num_heads_kv) will do too."""
    kernel = kernel_of("per_tensor")
    call = passed(kernel.quantize(*tensors()))
    out = kernel(**call)
    assert torch.equal(kernel(**call | {name: call[name][:1, :1].reshape(()) for name in DESCALES}), out)
    with pytest.raises(attngen.ArgumentError, match="argument k_descale: got 1 dimensions"):
        kernel(**call | {"k_descale": torch.ones(3)})


Q, K, V = tensors()
OPERANDS = kernel_of("per_block").quantize(Q, K, V)
E4M3 = passed(OPERANDS)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            {"q": OPERANDS, "k": K},
            "argument k: got Tensor, expected nothing beside operands of kernel.quantize",
        ),
        ({"q": OPERANDS, "v": V}, "argument v: got Tensor, expected nothing beside operands"),
        (
            {"q": Q, "k": K, "v": V, "q_descale": torch.ones(1)},
            "argument q_descale: got descales, expected none",
        ),
        ({"q": OPERANDS, "v_descale": torch.ones(1)}, "argument v_descale: got descales, expected none"),
        (
            {"q": replace(OPERANDS, scales="per_head")},
            "argument q: got operands with scales per_head, expected scales",
        ),
        (
            {"q": replace(OPERANDS, hadamard=True)},
            "argument q: got operands of incoherent: hadamard, expected incohe",
        ),
        ({"q": Q}, "argument k: got NoneType, expected a torch tensor"),
        ({"q": Q, "k": K}, "argument v: got NoneType, expected a torch tensor"),
        (
            {"q": Q.float(), "k": K, "v": V},
            "argument q: got dtype torch.float32, expected torch.bfloat16, torch.float16 or torch.float8_e4m3fn",
        ),
        ({"q": Q, "k": K.half(), "v": V}, "argument k: got dtype torch.float16, expected torch.bfloat16"),
        ({"q": None, "k": K, "v": V}, "argument q: got NoneType, expected a torch tensor"),
        ({**E4M3, "k": None}, "argument k: got NoneType, expected a torch tensor"),
        ({**E4M3, "k": K}, "argument k: got dtype torch.bfloat16, expected torch.float8_e4m3fn"),
        ({**E4M3, "v": V}, "argument v: got dtype torch.bfloat16, expected torch.float8_e4m3fn"),
        (
            {"q": E4M3["q"], "k": E4M3["k"], "v": E4M3["v"]},
            "argument q_descale: got nothing, expected a torch tensor",
        ),
        (
            {**E4M3, "q_descale": E4M3["q_descale"][..., :1]},
            "argument q_descale: got shape (2, 4, 1), expected f32[ba",
        ),
        (
            {**E4M3, "k_descale": E4M3["k_descale"].half()},
            "argument k_descale: got dtype torch.float16, expected torc",
        ),
        ({**E4M3, "v_descale": 1.0}, "argument v_descale: got float, expected a torch tensor"),
        (
            {**E4M3, "p_descale": torch.ones(1)},
            "argument p_descale: got an argument, expected one of what the spec",
        ),
        ({**E4M3, "layout": "sbhd"}, "argument layout: got"),
        ({"q": Q[..., :32], "k": K, "v": V}, "argument q: got shape"),
        ({"q": Q, "k": K, "v": V[:, 1:]}, "argument v: got shape"),
    ],
)
def test_what_no_call_takes_is_named(call: dict[str, Any], text: str) -> None:
    """One argument, what it was and what it should be."""
    with pytest.raises(attngen.ArgumentError) as caught:
        kernel_of("per_block")(**call)
    assert str(caught.value).startswith(text)


def test_a_kernel_of_other_inputs_quantises_nothing() -> None:
    """Nor does it take e4m3 tensors, or their descales."""
    kernel = attngen.compile({"target": "simulator", "problem": {"head_dim": 64}})
    for call in (
        lambda: kernel.quantize(Q, K, V),
        lambda: kernel(OPERANDS),
        lambda: kernel(E4M3["q"], E4M3["k"], E4M3["v"]),
        lambda: kernel(Q, K, V, q_descale=torch.ones(1)),
    ):
        with pytest.raises(attngen.ArgumentError):
            call()


@pytest.mark.parametrize("keys", [80, 139, 141, 300])
def test_v_of_another_length_than_k_is_refused(keys: int) -> None:
    """It is padded to whole blocks before the kernel sees it, where 80 keys and 140 would look alike."""
    kernel = kernel_of("per_head")
    call = passed(kernel.quantize(*tensors()))
    rows = call["v"][:, :1].expand(-1, keys, -1, -1).contiguous()
    with pytest.raises(attngen.ArgumentError, match=r"argument v: .*140, 2, 64\) ="):
        kernel(**call | {"v": rows})


def test_e4m3_values_that_want_a_gradient_are_refused() -> None:
    kernel = kernel_of("per_head")
    call = passed(kernel.quantize(*tensors()))
    with pytest.raises(attngen.ArgumentError, match="argument v: .*requires grad"):
        kernel(**call | {"v": call["v"].requires_grad_()})


def test_tensors_without_dimensions_are_named() -> None:
    kernel = kernel_of("per_tensor")
    call = passed(kernel.quantize(*tensors()))
    with pytest.raises(attngen.ArgumentError, match="argument q: .*0 dimensions"):
        kernel(**call | {"q": call["q"].flatten()[0]})
