"""Errors: the drawn form, to the letter, and the facts beside it."""

import copy
import pickle

import pytest

from attngen.errors import (
    ArgumentError,
    AttngenError,
    CompileError,
    Diagnostic,
    ExpressionError,
    InternalError,
    Location,
    PlanError,
    SpecError,
    ToolchainError,
)

PLACE = Location("specs/h100_fp8.yaml", 14, 12, "  block_n: 200", 3)


def diagnostic(
    location: Location | None = PLACE, note: str = "", nearest: tuple[str, ...] = ()
) -> Diagnostic:
    return Diagnostic(
        "tile.block_n = 200 is wrong", "some-rule", location, "tile.block_n", 200, note, nearest
    )


def carets(location: Location) -> str:
    """The line of carets of a diagnostic without a note."""
    return diagnostic(location).draw().splitlines()[2]


def test_the_documented_example_is_drawn_to_the_letter() -> None:
    """The form that the style guide shows, with its columns."""
    drawn = Diagnostic(
        message="tile.block_n = 200 must be a multiple of 32",
        rule="wgmma-k-step",
        location=PLACE,
        path="tile.block_n",
        value=200,
        note="P·V consumes block_n in k-steps of 32 for e4m3",
        nearest=("192", "224"),
    ).draw()
    assert drawn == (
        "specs/h100_fp8.yaml:14:12: tile.block_n = 200 must be a multiple of 32\n"
        "   14 |   block_n: 200\n"
        "      |            ^^^ P·V consumes block_n in k-steps of 32 for e4m3\n"
        "  nearest valid: 192 or 224                                              [rule wgmma-k-step]"
    )


@pytest.mark.parametrize(
    ("nearest", "words"),
    [(("a",), "a"), (("a", "b"), "a or b"), (("a", "b", "c"), "a, b or c")],
)
def test_the_nearest_values_are_told_in_words(nearest: tuple[str, ...], words: str) -> None:
    """One, two and three choices read as a person writes them."""
    assert diagnostic(nearest=nearest).draw().splitlines()[-1].startswith(f"  nearest valid: {words}  ")


def test_without_nearest_values_the_rule_keeps_its_column() -> None:
    """The rule ends in the same column whatever stands before it."""
    without, with_one = (diagnostic(nearest=nearest).draw().splitlines()[-1] for nearest in ((), ("96",)))
    assert without.strip() == "[rule some-rule]" and len(without) == len(with_one) == 92


def test_a_long_list_of_nearest_values_pushes_the_rule_but_never_runs_into_it() -> None:
    """At least two blanks stand between the values and the rule."""
    last = diagnostic(nearest=("x" * 100,)).draw().splitlines()[-1]
    assert last == f"  nearest valid: {'x' * 100}  [rule some-rule]"


def test_without_a_place_there_is_no_source_line() -> None:
    """Message, reason and rule stand alone."""
    lines = diagnostic(None, note="because").draw().splitlines()
    assert [line.strip() for line in lines] == ["tile.block_n = 200 is wrong", "because", "[rule some-rule]"]


def test_a_tab_before_the_value_is_repeated_under_the_source() -> None:
    """The caret stands under the value however wide the terminal makes a tab."""
    assert carets(Location("f", 1, 7, "\tname: x", 1)) == "      | \t     ^"


def test_wide_characters_count_two_columns_and_combining_ones_none() -> None:
    """Carets stand under what a terminal shows, not under the count of characters."""
    assert carets(Location("f", 1, 4, "日本: x", 1)) == "      | " + " " * 5 + "^"
    assert carets(Location("f", 1, 1, "日本: x", 2)) == "      | ^^^^"
    assert carets(Location("f", 1, 4, "e\u0301: x", 1)) == "      | " + " " * 2 + "^"


def test_a_stretch_past_the_end_of_its_line_is_cut_there() -> None:
    """No caret stands beyond the source, but one always stands."""
    assert carets(Location("f", 1, 4, "abcdef", 99)) == "      |    ^^^"
    assert carets(Location("f", 1, 7, "abcdef", 1)) == "      |       ^"
    assert carets(Location("f", 1, 1, "", 5)) == "      | ^"


@pytest.mark.parametrize("column", [1, 2, 50, 2500, 4996])
def test_a_long_line_is_cut_around_the_carets(column: int) -> None:
    """At most a hundred characters are shown, and the caret is under the right one."""
    text = "." * (column - 1) + "HERE" + "." * (4996 - column)
    _, source, marks, *_ = diagnostic(Location("f", 1, column, text, 4)).draw().splitlines()
    assert len(source) <= 8 + 102
    assert source[marks.index("^") :][:4] == "HERE" and marks.count("^") == 4


def test_control_characters_never_reach_the_terminal() -> None:
    """A hostile file cannot clear the screen through its own error."""
    drawn = diagnostic(
        Location("f\x1b", 1, 1, "\x1b[2J\x07 a\rb", 1), note="\x1b[31m", nearest=("\x9b",)
    ).draw()
    assert not any(ord(char) < 32 and char != "\n" or 0x7F <= ord(char) < 0xA0 for char in drawn)


def test_a_report_holds_every_diagnostic_in_order() -> None:
    """str() of the exception is the whole report; the diagnostics are there as facts."""
    first, second = diagnostic(nearest=("1",)), diagnostic(None)
    error = SpecError((first, second))
    assert str(error) == f"{first.draw()}\n\n{second.draw()}"
    assert error.diagnostics == (first, second)
    assert (second.path, second.value, second.rule) == ("tile.block_n", 200, "some-rule")


def test_the_classes_tell_the_users_faults_from_attngens_own() -> None:
    """Expression and plan errors are spec errors, and only InternalError asks for a report."""
    assert issubclass(ExpressionError, SpecError) and issubclass(PlanError, SpecError)
    assert "report" in str(InternalError("impossible"))
    for error in (ArgumentError("q", "rank 3", "rank 4"), CompileError("m", "log"), ToolchainError("m", "c")):
        assert isinstance(error, AttngenError) and "report" not in str(error)


def test_messages_carry_argument_log_and_cure() -> None:
    """What happened and what to do, as text and as attributes."""
    error = ArgumentError("q", "float32", "bfloat16", hint="q.to(torch.bfloat16)")
    assert str(error) == "argument q: got float32, expected bfloat16\n  hint: q.to(torch.bfloat16)"
    assert (error.argument, error.got, error.expected) == ("q", "float32", "bfloat16")
    assert str(ArgumentError("k", 3, 4)) == "argument k: got 3, expected 4"
    assert (
        str(CompileError("k.cu does not compile", "line 1: error\n"))
        == "k.cu does not compile\nline 1: error"
    )
    assert str(ToolchainError("no NVRTC", "pip install it")) == "no NVRTC\n  cure: pip install it"


@pytest.mark.parametrize(
    "error",
    [
        SpecError((diagnostic(),)),
        PlanError((diagnostic(None),)),
        ArgumentError("q", 1, 2, hint="h"),
        CompileError("m", "log"),
        ToolchainError("m", "c"),
        InternalError("m"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_cross_processes_whole(error: AttngenError) -> None:
    """A worker of a parallel build hands its error back with text and attributes."""
    for twin in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert type(twin) is type(error) and str(twin) == str(error) and vars(twin) == vars(error)
