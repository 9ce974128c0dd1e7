"""Specs of strangers: however large or odd, they are read in a time and a memory that grow with their length alone."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import attngen
from attngen.errors import MAX_TOLD, SpecError

HEAD_DIM = "problem: {head_dim: 64}\n"
SECONDS, MEGABYTES = 6.0, 200
"""What any text of up to 1 MiB may take. The slowest takes 1.6 s of a quiet machine, and thrice as much beside others;
what grows faster than the text takes minutes."""
MIB = 1 << 20


def many(line: str, count: int) -> str:
    """A line, numbered, again and again."""
    return "".join(line.replace("#", str(number)) for number in range(count))


TOO_MUCH = "holds more than 10,000 keys and values"
TEXTS: dict[str, tuple[str, str]] = {
    "unknown keys": (HEAD_DIM + many("k#: 1\n", 4900), "and 4,880 more"),
    "unknown keys, one line": (f"{{problem: {{head_dim: 64}}, {many('k#: 1, ', 4000)}}}", "and 3,980 more"),
    "unknown keys, no end": (HEAD_DIM + many("k#: 1\n", 95_000), TOO_MUCH),
    "duplicate keys": (HEAD_DIM + "name: x\n" * 4900, "and 4,879 more"),
    "merge keys": (HEAD_DIM + "<<: 1\n" * 4900, "and 4,880 more"),
    "keys that are lists": (HEAD_DIM + many("[#]: 1\n", 3300), "and 3,280 more"),
    "a long key": (f"{HEAD_DIM}? '{'x' * (MIB - 100)}'\n: 1\n", "at most 500 are read"),
    "anchors, one line": (f"{HEAD_DIM}check: [{many('&a# 1, ', 4900)}]", "more"),
    "anchors, no end": (f"{HEAD_DIM}check: [{many('&a# 1, ', 90_000)}]", "more"),
    "aliases, one line": (f"{HEAD_DIM}check: [{'*a, ' * 4900}]", "and 4,880 more"),
    "faulty definitions": (HEAD_DIM + "define:\n" + many("  d#: b +\n", 4000), "and 3,980 more"),
    "faulty defaults": (HEAD_DIM + "scalars:\n" + many("  s#: i32 = 1.#\n", 4900), "and 4,880 more"),
    "unread scalars": (HEAD_DIM + "scalars:\n" + many("  s#: f32\n", 4900), "and 4,880 more"),
    "unread tensors": (
        HEAD_DIM + "tensors:\n" + many("  t#: f32[bach, bitch, sequel]\n", 4900),
        "and 4,880 more",
    ),
    "unjudged definitions": (
        f"{HEAD_DIM}scalars: {{d0: f33}}\nmask: d4000\ndefine:\n"
        + "".join(f"  d{number}: d{number - 1}\n" for number in range(4000, 0, -1)),
        "scalars.d0 = f33",
    ),
    "unknown names among many": (
        f"{HEAD_DIM}mask: {' or '.join(f'scalar{i}' for i in range(700))}\nscalars:\n"
        + many("  scalars#: i32\n", 4900),
        "and 680 more",
    ),
    "calls among many names": (
        f"{HEAD_DIM}mask: g(0) == 1\ndefine:\n  f(x): x\n  g(x): {'+'.join(f'f({i})' for i in range(1200))}\nscalars:\n"
        + many("  s#: i32\n", 4900),
        "and 4,880 more",
    ),
    "long definitions": (
        HEAD_DIM + "define:\n" + many(f"  d#: {' and '.join(['causal'] * 900)}\n", 100),
        "longer than 100,000 characters together",
    ),
    "blanks in a head": (f"{HEAD_DIM}define:\n  ? 'f{' ' * (MIB - 100)}x y'\n  : b", "a key must be a word"),
    "blanks in a default": (f"{HEAD_DIM}scalars:\n  s: 'f32 = x{' ' * (MIB - 100)}y'", "at most 1,000 characters"),
    "a long name": (f"{HEAD_DIM}name: '{'x' * (MIB - 100)}'", "name = 'xxx"),
    "a number without end": (f"problem: {{head_dim: {'1' * (MIB - 100)}}}", "must be a positive integer"),
    "large numbers": (
        HEAD_DIM + "check:\n" + f"- {{heads: {'9' * 900}, heads_kv: 7, seqlen_q: 1, seqlen_k: 1}}\n" * 1100,
        "and 1,080 more",
    ),
    "torn heads": (f"{{problem: {{head_dim: 64}}, define: {{{'f(a, ' * 4900}}}}}", "and 4,880 more"),
    "torn expressions": (f"{{problem: {{head_dim: 64}}, mask: window({'1, ' * 4900}}}", "mask must be quoted"),
    "brackets": ("[" * (MIB - 100), "nested more than 16 deep"),
    "documents": (HEAD_DIM + "---\n" * 250_000, "a second document begins"),
    "directives": (many("%TAG !a#! tag:a\n", 50_000), "the spec is not YAML"),
    "characters that are none": ("\n" + "\0" * (MIB - 100), "the spec is not YAML"),
}  # fmt: skip


@pytest.mark.parametrize("case", TEXTS)
def test_a_hostile_text_is_refused_in_time(case: str, peak: Callable[[], float]) -> None:
    """At most 20 faults are told, and the number of the others, in SECONDS and MEGABYTES."""
    text, expected = TEXTS[case]
    start = time.process_time()
    with pytest.raises(SpecError) as caught:
        attngen.load(text)
    report = str(caught.value)
    assert time.process_time() - start < SECONDS and peak() < MEGABYTES
    assert expected in report and len(caught.value.diagnostics) <= MAX_TOLD and len(report) < 50_000


@pytest.fixture
def peak() -> Iterator[Callable[[], float]]:
    """Megabytes by which the memory of this process has grown at most."""
    if not (status := Path("/proc/self/status")).exists():
        pytest.skip("the system does not tell the peak of memory")
    Path("/proc/self/clear_refs").write_text("5")

    def megabytes(field: str) -> float:
        return float(status.read_text().partition(f"{field}:")[2].split()[0]) / 1024

    base = megabytes("VmRSS")
    yield lambda: megabytes("VmHWM") - base


def test_a_file_of_a_mebibyte_is_read_and_a_larger_one_is_not(tmp_path: Path) -> None:
    """Comments and blanks may fill a file; what is larger is refused, as a text and as a dict too."""
    path = tmp_path / "spec.yaml"
    path.write_text(HEAD_DIM.ljust(MIB))
    assert attngen.load(path).problem.head_dim.qk == 64
    path.write_text(HEAD_DIM.ljust(MIB + 1))
    for source in (path, HEAD_DIM.ljust(MIB + 1), {"problem": {"head_dim": 64}, "name": "x" * (MIB + 1)}):
        with pytest.raises(SpecError, match="is larger than 1 MiB"):
            attngen.load(source)


def bomb() -> list[Any]:
    """A list that would have 10^20 elements, if it were written out."""
    data: list[Any] = [1] * 10
    for _ in range(20):
        data = [data] * 10
    return data


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({f"k{number}": 1 for number in range(4900)}, "and 4,880 more"),
        ({f"k{number}": 1 for number in range(80_000)}, "<dict> holds more than 10,000 keys and values"),
        ({"scalars": {f"k{number}": "f33" for number in range(4900)}}, "and 4,880 more"),
        ({"x" * 600: 1}, "<dict> has a key of more than 500 characters"),
        ({"name": "x" * (MIB - 100)}, "name = xxx"),
        ({"check": bomb()}, "check[0] must be a mapping"),
        ({"tile": {"block_m": 10**5000}}, "tile.block_m is an integer of 16,610 bits"),
        ({10**5000: 1}, "a key in <dict> is an integer of 16,610 bits"),
        ({"problem": {"head_dim": 10**900}}, "must be a multiple of 8"),
        ({"check": range(10**9)}, "check is of type range"),
        ({"name": b"x" * 10**7}, "name is of type bytes"),
        ({"tile": {"block_m": frozenset(range(10**5))}}, "tile.block_m is of type frozenset"),
    ],
)
def test_a_hostile_dict_is_refused_in_time(data: dict[Any, Any], expected: str) -> None:
    """Dicts have the limits of texts, and may hold what no text can."""
    start = time.process_time()
    with pytest.raises(SpecError) as caught:
        attngen.load({"problem": {"head_dim": 64}, **data})
    assert expected in str(caught.value) and time.process_time() - start < SECONDS


@pytest.mark.parametrize(
    "number", [np.int32(96), np.array(96), torch.tensor(96), torch.tensor(96, dtype=torch.uint8)]
)
def test_numbers_without_dimensions_are_numbers(number: Any) -> None:
    """numpy scalars and tensors of one number stand for it, in a dict and in what replaces a value."""
    data = {
        "problem": {"head_dim": number},
        "tile": {"block_m": number},
        "schedule": {"persistent": np.bool_(True)},
        "check": [{"seqlen_q": number, "seqlen_k": number}],
    }
    spec = attngen.load(data)
    assert spec.problem.head_dim.qk == spec.tile.block_m == spec.check[0].seqlen_q == 96
    assert type(spec.tile.block_m) is int and spec.schedule.persistent is True
    assert spec.replace({"tile.block_n": number}).tile.block_n == 96


@pytest.mark.parametrize(
    "value", [np.float32(64), torch.tensor([64]), torch.tensor(64, device="meta"), np.array([64])]
)
def test_other_arrays_are_no_numbers(value: Any) -> None:
    """A real number, an array and a tensor without data are refused by the name of the value."""
    with pytest.raises(SpecError, match=r"problem\.head_dim = "):
        attngen.load({"problem": {"head_dim": value}})


@pytest.mark.parametrize(
    "path", ["mask", "name", "target", "tile.block_m", "precision.seed", "scalars.cap", "check"]
)
def test_a_mapping_where_a_value_was_expected_says_so(path: str) -> None:
    """The note names what stands there, with its first keys."""
    block, _, key = path.partition(".")
    mapping = "{left: 1, right: 2}"
    text = f"{HEAD_DIM}{block}: " + (f"{{{key}: {mapping}}}" if key else mapping)
    with pytest.raises(SpecError) as caught:
        attngen.load(text)
    fault = next(each for each in caught.value.diagnostics if each.path == path)
    assert fault.note == "this is a mapping, with keys left, right"


def test_json_may_be_indented_with_tabs() -> None:
    """Tabs are blanks inside {} and []; where a block of YAML begins they are named."""
    assert (
        attngen.load('{\n\t"problem":\t{\n\t\t"head_dim": 64\t},\n\t"mask": "causal"\n}\n').mask == "causal"
    )
    for text in ("problem:\n\thead_dim: 64\n", '\t{"problem": {"head_dim": 64}}'):
        with pytest.raises(SpecError, match="a tab cannot stand here") as caught:
            attngen.load(text)
        assert caught.value.diagnostics[0].note == "indent with spaces"


@pytest.mark.parametrize(
    ("dim", "precision", "nearest"),
    [
        ("0100", "bf16", ("96", "104")),
        ("0100", "e4m3", ("96", "112")),
        ("00", "bf16", ("32",)),
        ("1e9", "f16", ("256",)),
    ],
)
def test_a_head_dim_that_is_no_integer_is_told_legal_ones(
    dim: str, precision: str, nearest: tuple[str, ...]
) -> None:
    """What is proposed for it passes."""
    for text in (f"problem: {{head_dim: {dim}}}\n", f"problem: {{head_dim: {{qk: {dim}, v: 64}}}}\n"):
        with pytest.raises(SpecError) as caught:
            attngen.load(f"{text}precision: {{inputs: {precision}}}\n")
        assert caught.value.diagnostics[0].nearest == nearest
    for each in nearest:
        attngen.load(f"problem: {{head_dim: {each}}}\nprecision: {{inputs: {precision}}}\n")
