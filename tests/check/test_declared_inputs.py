"""Values for what specs declare: kinds, sizes, files, and what is refused."""

import io
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attngen.check.declared_inputs import IDS, MOST_DRAWN, NEW_DIMENSION, Given, declared_inputs
from attngen.check.inputs import Shape
from attngen.errors import ArgumentError
from attngen.expr import Declarations, read_declarations

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
def test_sorted_tensors_are_documents_of_any_length(dtype: str) -> None:
    """They never fall, have many lengths, a single key among them, and of i32 ids below 0; other words are refused."""
    declarations = declared({"doc": f"{dtype}[batch, seqlen_k] sorted"})
    lengths: set[int] = set()
    for seed in range(20):
        doc = declared_inputs(declarations, SHAPE, seed=seed)["doc"].long()
        assert doc.shape == (2, 400) and (doc.diff(dim=-1) >= 0).all() and not torch.equal(doc[0], doc[1])
        assert (doc.min() < 0) == (dtype == "i32") and len(doc[0].unique()) > 4
        lengths |= set(doc[0].unique(return_counts=True)[1].tolist())
    assert 1 in lengths and max(lengths) > 80 and len(lengths) > 40
    assert not declared_inputs(declarations, SHAPE, given=Given({"doc": "zeros"}))["doc"].any()
    for kind in ("random", "hashed"):
        with pytest.raises(ArgumentError, match="sorted or zeros"):
            declared_inputs(declarations, SHAPE, given=Given({"doc": kind}))


def test_a_file_for_a_sorted_tensor_is_read(tmp_path: Path) -> None:
    """What does not fall is passed as it is; what falls is refused, with its place."""
    declarations = declared({"doc": "i32[batch, seqlen_k] sorted"})
    doc = torch.arange(800, dtype=torch.int32).view(2, 400)
    torch.save(doc, tmp_path / "doc.pt")
    found = declared_inputs(declarations, SHAPE, given=Given({"doc": str(tmp_path / "doc.pt")}))
    assert torch.equal(found["doc"], doc)
    doc[1, 7] = 0
    torch.save(doc, tmp_path / "doc.pt")
    with pytest.raises(ArgumentError, match=r"0 at \[1, 7\], behind 406 at \[1, 6\]"):
        declared_inputs(declarations, SHAPE, given=Given({"doc": str(tmp_path / "doc.pt")}))


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
    monkeypatch.setattr("attngen.check.declared_inputs.MOST_DRAWN", 100)
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


def saved(x: object, *, as_zip: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(x, file, _use_new_zipfile_serialization=as_zip)
    return file.getvalue()


def with_pickle(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """A file of torch.save with another pickle in it, and checksums that fit."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(old.read(name)) if name.endswith("data.pkl") else old.read(name))
    return file.getvalue()


IDS_OF_10 = torch.arange(10, dtype=torch.int32)
ZIPPED = [
    saved(x) for x in (IDS_OF_10, IDS_OF_10.to_sparse(), {"a": IDS_OF_10}, torch.nn.Parameter(torch.ones(3)))
]
PLAIN = [saved(IDS_OF_10, as_zip=False), saved(torch.ones(3, dtype=torch.complex64), as_zip=False)]
CHANGES = st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=4)


def changed(data: bytes, changes: list[tuple[int, int]]) -> bytes:
    mutable = bytearray(data)
    for place, byte in changes:
        mutable[place % len(data)] = byte
    return bytes(mutable)


@given(file=st.sampled_from([*ZIPPED, *PLAIN]), changes=CHANGES, cut=st.integers(0, 3000))
@settings(suppress_health_check=list(HealthCheck))
def test_a_mutated_file_is_taken_or_refused_in_one_sentence(
    tmp_path: Path, file: bytes, changes: list[tuple[int, int]], cut: int
) -> None:
    """Bytes changed, in the pickle with its checksum too, or cut off: a tensor or one short error, and no warning."""
    path = tmp_path / "x.pt"
    for data in (
        changed(file, changes),
        file[:cut],
        with_pickle(file, lambda pickle: changed(pickle, changes)) if file in ZIPPED else b"",
    ):
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                declared_inputs(declared({"x": "i32[batch, seqlen_k]"}), SHAPE, given=Given({"x": str(path)}))
            except ArgumentError as fault:
                assert str(fault).startswith("argument --tensor x: got ") and str(fault).count("\n") == 1
                assert len(str(fault)) < 600


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(3).to_sparse(),
        lambda: torch.ones(3, device="meta"),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_file_of_a_tensor_without_plain_data_is_refused(
    tmp_path: Path, make: Callable[[], torch.Tensor]
) -> None:
    """Sparse, nested, quantized and meta tensors are no values of a declared tensor."""
    path = tmp_path / "x.pt"
    torch.save(make(), path)
    with pytest.raises(ArgumentError, match="expected a (dense tensor|file with a tensor)"):
        declared_inputs(declared({"x": "f32[batch]"}), SHAPE, given=Given({"x": str(path)}))


class Harm:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    """A pickle that would open a file for writing is refused, and the file is not there."""
    path = tmp_path / "x.pt"
    torch.save(Harm(str(tmp_path / "harm")), path)
    with pytest.raises(ArgumentError, match="a file with a tensor"):
        declared_inputs(declared({"x": "f32[batch]"}), SHAPE, given=Given({"x": str(path)}))
    assert not (tmp_path / "harm").exists()


def test_a_tensor_that_no_memory_holds_is_refused_before_it_is_drawn() -> None:
    """Dimensions of 2^30 each are legal to declare."""
    with pytest.raises(MemoryError, match="x, .* takes .* GiB, and this machine has"):
        declared_inputs(declared({"x": "f32[1073741823, 1073741823, 1073741823]"}), SHAPE)
