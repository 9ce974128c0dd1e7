"""Values for what specs declare: kinds, sizes, files, and what is refused."""

from pathlib import Path

import pytest
import torch

from attngen.declared_inputs import IDS, MOST_DRAWN, NEW_DIMENSION, Given, declared_inputs
from attngen.errors import ArgumentError
from attngen.expr import Declarations, read_declarations
from attngen.inputs import Shape

SHAPE = Shape(batch=2, heads=6, heads_kv=3, seqlen_q=5, seqlen_k=400)


def declared(tensors: dict[str, str] | None = None, scalars: dict[str, str] | None = None) -> Declarations:
    reading = read_declarations(scalars or {}, tensors or {}, {})
    assert not reading.faults
    return reading.declarations


def test_dimensions_are_the_sizes_of_the_call() -> None:
    """Each name of a size, a number, and a name of its own give the shape; the type is the declared one."""
    tensors = declared_inputs(
        declared({"x": "f16[batch, num_heads_q, num_heads_kv]", "y": "bool[seqlen_q, seqlen_k, 7, buckets]"}),
        SHAPE,
    )
    assert tensors["x"].shape == (2, 6, 3) and tensors["x"].dtype == torch.float16
    assert tensors["y"].shape == (5, 400, 7, NEW_DIMENSION) and tensors["y"].dtype == torch.bool


@pytest.mark.parametrize("dtype", ["i32", "u8"])
def test_integers_are_sorted_ids_of_documents(dtype: str) -> None:
    """Without a word integers ascend along the last dimension and take many small values, in each row others."""
    doc = declared_inputs(declared({"doc": f"{dtype}[batch, seqlen_k]"}), SHAPE)["doc"].long()
    assert (doc.diff(dim=-1) >= 0).all() and doc.unique().tolist() == list(range(IDS))
    assert not torch.equal(doc[0], doc[1])


@pytest.mark.parametrize("dtype", ["i32", "u8"])
def test_hashed_ids_keep_documents_and_lose_their_order(dtype: str) -> None:
    """The same stretches of equal ids as sorted has, but no ascending ones; none is negative."""
    declarations = declared({"doc": f"{dtype}[seqlen_k]"})
    plain, hashed = (
        declared_inputs(declarations, SHAPE, given=Given({"doc": kind}))["doc"].long()
        for kind in ("sorted", "hashed")
    )
    assert torch.equal(plain.diff() != 0, hashed.diff() != 0)
    assert (hashed.diff() < 0).any() and (hashed >= 0).all() and len(hashed.unique()) == IDS


def test_kinds_of_reals_and_truth_values() -> None:
    """Random reals are N(0, 1), random truth is a half, sorted ascends, zeros are zeros."""
    declarations = declared({"x": "f32[seqlen_k, seqlen_k]", "y": "bool[seqlen_k, seqlen_k]"})
    random = declared_inputs(declarations, SHAPE)
    assert abs(random["x"].mean()) < 0.02 and abs(random["x"].std() - 1) < 0.02
    assert abs(random["y"].float().mean() - 0.5) < 0.02
    given = declared_inputs(declarations, SHAPE, given=Given({"x": "sorted", "y": "zeros"}))
    assert (given["x"].diff(dim=-1) >= 0).all() and not given["y"].any()


def test_a_seed_decides_and_a_tensor_does_not_depend_on_others() -> None:
    """The same seed gives the same tensor, beside others too; another seed gives another, and so does another name."""
    alone = declared_inputs(declared({"x": "f32[seqlen_k]"}), SHAPE)["x"]
    beside = declared_inputs(declared({"w": "f32[seqlen_k]", "x": "f32[seqlen_k]"}), SHAPE)
    assert torch.equal(alone, beside["x"]) and not torch.equal(beside["w"], beside["x"])
    assert not torch.equal(alone, declared_inputs(declared({"x": "f32[seqlen_k]"}), SHAPE, seed=1)["x"])


def test_large_tensors_repeat_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the most that is drawn numbers come again, in memory of their own."""
    assert MOST_DRAWN >= 2**20
    monkeypatch.setattr("attngen.declared_inputs.MOST_DRAWN", 100)
    x = declared_inputs(declared({"x": "bf16[num_heads_q, seqlen_k]"}), SHAPE)["x"]
    assert x.is_contiguous() and torch.equal(x.flatten()[:100], x.flatten()[100:200])


def test_scalars_have_a_value_given_or_by_default() -> None:
    """Values that are given are read as a spec's are; a default is one too, so that a reference never lacks it."""
    declarations = declared(scalars={"n": "i32 = 4", "cap": "f32", "on": "bool = true"})
    assert declared_inputs(declarations, SHAPE, given=Given(scalars={"cap": "2.5", "on": "false"})) == {
        "n": 4,
        "cap": 2.5,
        "on": False,
    }


def test_files_hold_tensors_and_bind_dimensions(tmp_path: Path) -> None:
    """A file of torch.save is passed as it is, and a dimension that it binds is that of drawn tensors too."""
    path = tmp_path / "table.pt"
    table = torch.randn(9, 6)
    torch.save(table, path)
    declarations = declared({"other": "f32[buckets]", "table": "f32[buckets, num_heads_q]"})
    found = declared_inputs(declarations, SHAPE, given=Given({"table": str(path)}))
    assert list(found) == ["other", "table"] and torch.equal(found["table"], table)
    assert found["other"].shape == (9,)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (Given(scalars={"cap": "many"}), "argument cap: got 'many', expected a number"),
        (
            Given(scalars={}),
            "argument cap: got nothing, expected a value: the spec declares f32 without default",
        ),
        (Given({"x": "sortd"}, {"cap": "1"}), "--tensor x=sorted"),
        (Given({"x": "hashed"}, {"cap": "1"}), "hashed, which is for integers"),
        (Given({"x": "no.pt"}, {"cap": "1"}), "or the path of a file"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(given: Given, expected: str) -> None:
    """The error names the argument, what was said, and what may be."""
    with pytest.raises(ArgumentError) as fault:
        declared_inputs(declared({"x": "f32[batch]"}, {"cap": "f32"}), SHAPE, given=given)
    assert expected in str(fault.value)


@pytest.mark.parametrize(("saved", "word"), [(b"not a tensor", "("), ({"a": 1}, "with a dict"), (b"", "(")])
def test_files_without_a_tensor_are_refused(tmp_path: Path, saved: object, word: str) -> None:
    """Noise, nothing, and a file of something else are the user's to mend; nothing in it is run."""
    path = tmp_path / "x.pt"
    if isinstance(saved, bytes):
        path.write_bytes(saved)
    else:
        torch.save(saved, path)
    with pytest.raises(ArgumentError, match="a file with a tensor") as fault:
        declared_inputs(declared({"x": "f32[batch]"}), SHAPE, given=Given({"x": str(path)}))
    assert word in str(fault.value)


def test_names_that_nothing_declares_are_refused() -> None:
    """One spec of several may lack a name; one that none has is refused with the nearest."""
    both = [declared({"doc": "i32[batch]"}), declared({"slopes": "f32[num_heads_q]"})]
    Given({"doc": "zeros", "slopes": "zeros"}).check_names(both)
    with pytest.raises(ArgumentError, match="--tensor slops: .* a tensor that is declared: slopes"):
        Given({"slops": "zeros"}).check_names(both)
    with pytest.raises(ArgumentError, match="none: no scalar is declared"):
        Given(scalars={"n": "1"}).check_names(both)
