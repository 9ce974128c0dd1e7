"""Numbers that are too large, streams and folders that cannot be written: exit code 2, one sentence, no traceback."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from attngen import memory
from attngen.cli import main
from attngen.cli.tiles import MOST_ROW_BLOCKS, MOST_TILES
from tests.effort import examples

Attngen = Callable[..., Result]
LONG = "9" * 5000
DECLARED = (
    "target: sm_80\nproblem: {head_dim: 32}\nscalars: {n: i32 = 4, cap: f32 = 2.0}\n"
    "tensors: {doc: 'i32[batch, seqlen_k]'}\nmask: kv_idx < n + 1000 and document(doc)\nscore: softcap(score, cap)\n"
)


def assert_told(result: Result) -> None:
    """The user's fault, in lines that can be read, or nothing at fault."""
    assert result.exit_code in (0, 2), (result.output, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert max(map(len, result.stderr.splitlines()), default=0) < 500
    assert result.exit_code == 0 or result.stderr.strip()


NUMBERS = st.one_of(
    st.sampled_from([LONG, f"-{LONG}", "1e22", "nan", "inf", "²", "1_0", "0x10", "-1", "", "1,2", "1.5"]),
    st.sampled_from([2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**9, 10**22, -(2**63) - 1, -(10**22)]).map(
        str
    ),
    st.one_of(st.integers(2**40, 10**40), st.integers(-(10**40), 20)).map(
        str
    ),  # between them calls take hours
)
OF_CALLS = ("--batch", "--heads", "--heads-kv", "--seqlen", "--seqlen-q", "--seqlen-k")
ARGUMENTS: tuple[tuple[str, ...], ...] = (
    *(("run", "small.yaml", "--device", "cpu", option) for option in (*OF_CALLS, "--seed")),
    *(("explain", "small.yaml", option) for option in OF_CALLS),
    *(("explain", "small.yaml", "--tiles", "t.svg", option) for option in OF_CALLS),
    *(("explain", "small.yaml", "--arch", "sm_90a", "--timeline", "t.svg", option) for option in OF_CALLS),
    ("check", "small.yaml", "--run", "--seed"),
    *(("bench", "small.yaml", option) for option in ("--seqlen", "--tokens", "--width", "--rounds")),
    *(("fuzz", "small.yaml", "--arch", "no", option) for option in ("--examples", "--minutes", "--seed")),
    ("fuzz", "--arch", "no", "--device", "cuda", "--expressions"),
    *(("check", "declared.yaml", "--run", "--scalar", f"{name}=") for name in ("n", "cap")),
    ("check", "declared.yaml", "--run", "--tensor", "doc="),
    *(("check", "small.yaml", "--set", f"{key}=") for key in ("tile.block_n", "schedule.stages", "mask")),
    ("fuzz", "small.yaml", "--examples", "1", "--set", "tile.block_m="),
    *(
        (command, "ragged.yaml", option)
        for command in ("run", "explain")
        for option in ("--lengths", "--lengths-q")
    ),
    ("explain", "ragged.yaml", "--tiles", "t.svg", "--lengths"),
    *(("check",), ("build", "small.yaml", "--arch"), ("fuzz", "--repro")),
)


@given(st.sampled_from(ARGUMENTS), NUMBERS)
@example(("run", "small.yaml", "--device", "cpu", "--seqlen"), str(10**9))
@example(("explain", "small.yaml", "--batch"), str(10**9))
@example(("explain", "small.yaml", "--heads-kv"), "3")
@example(("check", "small.yaml", "--set", "schedule.stages="), str(10**9))
@example(("run", "ragged.yaml", "--lengths"), str(10**9))
@example(("explain", "ragged.yaml", "--lengths"), str(10**9))
@example(("explain", "ragged.yaml", "--tiles", "t.svg", "--lengths"), str(10**9))
@example(("fuzz", "--repro"), "[" * 100_000)
@example(("build", "small.yaml", "--arch"), LONG)
@settings(suppress_health_check=list(HealthCheck))
def test_any_number_of_any_option_is_taken_or_refused(
    attngen: Attngen, small: str, arguments: tuple[str, ...], number: str
) -> None:
    """However large, long, negative or odd: a result or a sentence, and never a process that outgrows the machine."""
    Path("declared.yaml").write_text(DECLARED)
    Path("ragged.yaml").write_text(
        "target: simulator\nproblem: {head_dim: 8, queries: ragged, keys: ragged}\n"
    )
    *rest, last = arguments
    assert_told(attngen(*rest, f"{last}{number}") if last.endswith("=") else attngen(*arguments, number))


@pytest.mark.parametrize(
    "options",
    [
        ("--batch", str(2 * MOST_ROW_BLOCKS)),
        ("--seqlen", str(2**20)),
        ("--seqlen-q", "1", "--seqlen-k", str(2**30 - 512)),
    ],
)
@pytest.mark.parametrize("picture", ["--tiles", "--timeline"])
def test_pictures_of_too_many_tiles_are_refused_at_once(
    attngen: Attngen, hopper: str, options: tuple[str, ...], picture: str
) -> None:
    """What would be counted for hours says how many tiles there are and how many may be."""
    result = attngen("explain", hopper, picture, "out.svg", *options)
    assert result.exit_code == 2 and not Path("out.svg").exists(), result.output
    assert any(f"at most {most}" in result.stderr for most in (MOST_TILES, MOST_ROW_BLOCKS, 2**14))


def test_a_call_that_no_memory_holds_is_refused_before_it_is_drawn(
    attngen: Attngen, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux would grant the memory and kill the process: what it takes is held against what the machine has."""
    monkeypatch.setattr(memory, "machine_bytes", lambda: 2**20)
    result = attngen("run", small, "--device", "cpu", "--batch", "1000")
    assert result.exit_code == 2 and "out of memory: a call of q (1000, 128, 1, 32)" in result.stderr
    assert "GiB, and this machine has" in result.stderr


@pytest.mark.parametrize(
    "fault",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 128 bytes."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has"),
    ],
)
def test_running_out_of_memory_is_a_sentence(
    attngen: Attngen, small: str, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    """Python's, the CPU allocator's and the GPU's word for it; another RuntimeError stays a fault of attngen."""

    def fails(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr("attngen.cli.comparison.draw", fails)
    result = attngen("check", small, "--run")
    assert result.exit_code == 2 and result.stderr.splitlines()[-2].startswith("out of memory: ")
    fault = RuntimeError("something else")
    assert attngen("check", small, "--run").exception is fault


def case(batch: object = 1, heads: object = 1, heads_kv: object = 1, **more: object) -> str:
    """A case of fuzzing as a line, with these texts for values."""
    sizes = f'"batch": {batch}, "heads": {heads}, "heads_kv": {heads_kv}, "seqlen_q": 4, "seqlen_k": 4'
    rest = "".join(f', "{name}": {value}' for name, value in more.items())
    return f'{{"spec": "fa2_d64", "shape": {{{sizes}}}{rest}}}'


NO_SIZES = (10**22, -1, '"a"', "1.5", "true", "null", "NaN", "[1]")
REPROS = [
    *("[" * 100_000, '{"a":' * 5000, LONG, "null", "1", "{}", '{"spec": 1, "shape": {}}', ""),
    *(case(batch=size) for size in NO_SIZES),
    *(case(heads=3, heads_kv=2), case(heads_kv=0), case(batch=10**8, heads=100)),
    *(case(seed=seed) for seed in (10**30, '"a"', "null", "1.5")),
    *(case(softmax_scale=scale) for scale in ("NaN", "9" * 400, "[]", "true", '"a"')),
    *(
        case(rule='"nope"'),
        case(rule="[]"),
        case(memory="[]"),
        case(layout="3"),
        case(kind="{}"),
        case(x="3"),
    ),
]


@pytest.mark.parametrize("number", range(len(REPROS)))
def test_a_case_that_is_none_is_the_users_fault(attngen: Attngen, number: int) -> None:
    """A line that `fuzz` did not print is refused; it is not a property that fails."""
    result = attngen("fuzz", "--repro", REPROS[number])
    assert result.exit_code == 2, result.output
    assert_told(result)


def outputs(folder: str) -> list[tuple[str, ...]]:
    return [
        ("build", "small.yaml", "-o", folder),
        ("explain", "small.yaml", "--tiles", f"{folder}/t.svg"),
        ("explain", "hopper.yaml", "--timeline", f"{folder}/t.png"),
    ]


@pytest.mark.parametrize("folder", ["small.yaml/x", "/dev/null/x", "/proc/nothing/x", "x" * 300])
@pytest.mark.parametrize("kind", range(3))
@pytest.mark.usefixtures("small", "hopper")
def test_a_folder_that_cannot_be_made_is_named(attngen: Attngen, folder: str, kind: int) -> None:
    """A folder in a file or a device, one that /proc does not have, a name that is too long: option, path, reason."""
    arguments = outputs(folder)[kind]
    result = attngen(*arguments)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.output
    assert f"argument {'--output' if kind == 0 else arguments[2]}: got {folder[:20]}" in result.stderr


def exit_code_and_stderr(
    arguments: list[str], stdout: int | None, stderr: int | None = None
) -> tuple[int, str]:
    """Run the command line in a process of its own, on these file descriptors and to the end as Python ends."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 3
        try:
            sys.stdout = None if stdout is None else os.fdopen(stdout, "w")  # type: ignore[assignment]
            sys.stderr = os.fdopen(writer if stderr is None else stderr, "w", buffering=1)
            main(arguments)
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 3
            for stream in filter(None, (sys.stdout, sys.stderr)):
                stream.flush()
        finally:
            os._exit(code)
    os.close(writer)
    with open(reader) as told:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), told.read()


def unread_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="asks for Linux's full device")
def test_a_stdout_that_cannot_be_written_is_told_on_stderr() -> None:
    """Exit code 2 and one sentence, whether the disk is full, the stream closed or the reader gone."""
    full = os.open("/dev/full", os.O_WRONLY)
    for stdout, why in (
        (full, "No space left on device"),
        (None, "it is closed"),
        (unread_pipe(), "Broken pipe"),
    ):
        code, told = exit_code_and_stderr(["schema"], stdout)
        assert code == 2 and told.splitlines()[0] == f"standard output cannot be used: {why}"
        assert len(told.splitlines()) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="asks for Linux's full device")
def test_a_stderr_that_cannot_be_written_changes_no_exit_code() -> None:
    """Where nobody can be told, the exit code still says whose fault it was."""
    for arguments in (["check", "nothing.yaml"], ["check"], ["run", "x.yaml", "--batch", "x"]):
        for stderr in (os.open("/dev/full", os.O_WRONLY), unread_pipe()):
            assert exit_code_and_stderr(arguments, os.open(os.devnull, os.O_WRONLY), stderr)[0] == 2


def test_the_console_does_not_leave_for_a_broken_pipe(
    attngen: Attngen, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rich ends a process whose reader is gone with 1, which says that a comparison failed."""

    def broken(*_: object) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("rich.console.Console._write_buffer", broken)
    result = attngen("explain", small)
    assert result.exit_code == 2 and "standard output cannot be used: Broken pipe" in result.stderr


@given(
    changes=st.lists(st.tuples(st.integers(0, 249), st.integers(0, 255)), max_size=4), cut=st.integers(0, 900)
)
@settings(max_examples=examples(0.5), suppress_health_check=list(HealthCheck))
def test_a_mutated_safetensors_file_is_taken_or_refused(
    attngen: Attngen, small: str, changes: list[tuple[int, int]], cut: int
) -> None:
    """`run --inputs` on a file with bytes of its header changed, or cut: no exception of the reader's comes through."""
    q = torch.zeros(1, 3, 1, 32, dtype=torch.bfloat16)
    data = bytearray(save({"q": q, "k": q.clone(), "v": q.clone()}))
    for place, byte in changes:
        data[place] = byte
    Path("x.safetensors").write_bytes(data[: cut if changes == [] else None])
    assert_told(attngen("run", small, "--device", "cpu", "--inputs", "x.safetensors"))
