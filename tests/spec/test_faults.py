"""Faults of a spec: where, what value, which rule, nearest valid; all in one report."""

from pathlib import Path
from typing import Any

import pytest

import attngen
from attngen.errors import Diagnostic
from attngen.resources import shipped_names

HEAD_DIM = "problem: {head_dim: 64}\n"


def faults(source: Any) -> tuple[Diagnostic, ...]:
    with pytest.raises(attngen.SpecError) as caught:
        attngen.load(source)
    return caught.value.diagnostics


def only(source: Any) -> Diagnostic:
    found = faults(source)
    assert len(found) == 1, "\n".join(map(str, found))
    return found[0]


def underlined(fault: Diagnostic) -> str:
    """What the carets of a fault mark in its source line."""
    place = fault.location
    assert place is not None
    return place.text[place.column - 1 :][: place.length]


@pytest.mark.parametrize(
    ("text", "message", "marked", "nearest", "rule"),
    [
        ("tile: {block_n: 0}", "tile.block_n = 0 must be a positive integer or auto", "0", ("1",), "positive-integer"),
        ("tile: {block_n: -64}", "tile.block_n = -64 must be", "-64", ("1",), "positive-integer"),
        ("tile: {block_n: on}", "tile.block_n = on must be", "on", ("auto",), "positive-integer"),
        ("tile: {block_n: true}", "tile.block_n = true must be", "true", ("auto",), "positive-integer"),
        ("tile: {block_n: 1e-3}", "tile.block_n = 1e-3 must be", "1e-3", ("1",), "positive-integer"),
        ("tile: {block_n: 64.0}", "tile.block_n = 64.0 must be", "64.0", ("64",), "positive-integer"),
        ("tile: {block_n: '64'}", "tile.block_n = '64' must be", "'64'", ("64",), "positive-integer"),
        ("tile: {block_n: 0x40}", "tile.block_n = 0x40 must be", "0x40", ("auto",), "positive-integer"),
        ("tile: {block_n: 0100}", "tile.block_n = 0100 must be", "0100", ("100",), "positive-integer"),
        ("tile: {block_n: 1_000}", "tile.block_n = 1_000 must be", "1_000", ("1000",), "positive-integer"),
        ("tile: {block_n: .inf}", "tile.block_n = .inf must be", ".inf", ("auto",), "positive-integer"),
        ("tile: {block_n: }", "tile.block_n is empty; it must be a positive", " ", ("auto",), "positive-integer"),
        ("tile: {block_n: [64]}", "tile.block_n must be a positive integer", "[64]", ("auto",), "positive-integer"),
        ("tile: {blok_n: 64}", "unknown key tile.blok_n", "blok_n", ("block_n", "block_m"), "known-keys"),
        ("block_m: 64", "unknown key block_m", "block_m", ("tile.block_m", "blocks.block_m"), "known-keys"),
        ("tile.block_m: 64", "unknown key tile.block_m", "tile.block_m", ("tile: {block_m: ...}",), "known-keys"),
        ("head_dim: 64", "unknown key head_dim", "head_dim", ("problem.head_dim",), "known-keys"),
        ("tile: {1: 2}", "unknown key tile.1", "1", ("block_m", "block_n"), "known-keys"),
        ("tile: 64", "tile = 64 must be a mapping of keys: block_m, block_n", "64", (), "spec-mapping"),
        ("tile:", "tile is empty; it must be a mapping of keys: block_m, block_n", "", (), "spec-mapping"),
        ("target: sm_90", "target = sm_90 must be one of auto, simulator,", "sm_90", ("sm_90a",), "known-targets"),
        ("target: sim", "target = sim must be one of", "sim", ("simulator",), "known-targets"),
        ("target: sm_91", "target = sm_91 must be one of", "sm_91", ("sm_89", "sm_90a"), "known-targets"),
        ("schedule: {kind: pingpang}", "schedule.kind = pingpang must be one of auto, serial, fa2, warp_specialized, ",
         "pingpang", ("pingpong",), "known-schedules"),
        ("schedule: {kind: ws}", "schedule.kind = ws must be one of auto, serial, fa2, warp_specialized, pingpong",
         "ws", ("auto", "serial", "fa2", "warp_specialized", "pingpong"), "known-schedules"),
        ("schedule: {warpgroups: 0}", "schedule.warpgroups = 0 must be a positive integer or auto", "0", ("1",),
         "positive-integer"),
        ("schedule: {overlap: 1}", "schedule.overlap = 1 must be true, false or auto", "1", ("true", "false", "auto"),
         "boolean"),
        ("schedule: {overlap: on}", "schedule.overlap = on must be true, false or auto", "on",
         ("true", "false", "auto"), "boolean"),
        ("schedule: {persistent: 'no'}", "schedule.persistent = 'no' must be true, false or auto", "'no'",
         ("true", "false", "auto"), "boolean"),
        ("schedule: {order: columns}", "schedule.order = columns must be one of auto, heads, rows", "columns",
         ("auto", "heads", "rows"), "known-orders"),
        ("schedule: {stages: two}", "schedule.stages = two must be", "two", ("auto",), "positive-integer"),
        ("precision: {inputs: fp16}", "precision.inputs = fp16 must be one of f16, bf16, e4m3, f32", "fp16",
         ("f16", "bf16"), "known-formats"),
        ("precision: {output: e4m3}", "precision.output = e4m3 must be one of auto, f16, bf16, f32", "e4m3",
         ("auto", "f16", "bf16", "f32"), "known-formats"),
        ("precision: {inputs: e5m2}", "precision.inputs = e5m2 must be one of f16, bf16, e4m3, f32", "e5m2", ("e4m3",),
         "known-formats"),
        ("precision: {inputs: e4m3, scales: token}", "precision.scales = token must be one of auto,", "token",
         ("per_token",), "known-scales"),
        ("precision: {inputs: e4m3, incoherent: signs}", "precision.incoherent = signs must be one of none, hadamard",
         "signs", ("none", "hadamard"), "known-transforms"),
        ("precision: {scales: per_head}", "precision.scales = per_head means nothing to bf16", "per_head", ("auto",),
         "precision-field"),
        ("precision: {inputs: f16, incoherent: hadamard}", "precision.incoherent = hadamard means nothing to f16",
         "hadamard", ("none",), "precision-field"),
        ("precision: {seed: 3}", "precision.seed = 3 means nothing to bf16", "3", ("0",), "precision-field"),
        ("precision: {promote: 0}", "precision.promote = 0 means nothing to bf16", "0", ("auto",), "precision-field"),
        ("precision: {inputs: e4m3, seed: 3}", "precision.seed = 3 means nothing without a Hadamard matrix", "3",
         ("0",), "precision-field"),
        ("precision: {inputs: e4m3, seed: -1}", "precision.seed = -1 must be an integer from 0 to 2^63 - 1", "-1",
         ("0",), "seed"),
        ("precision: {inputs: e4m3, promote: 4}", "precision.promote = 4 must be 0 (never), 1 (every block of keys) or",
         "4", ("1",), "promotion"),
        ("precision: {inputs: e4m3, promote: -1}", "precision.promote = -1 must be 0 (never), 1 (every block of", "-1",
         ("0", "1", "auto"), "promotion"),
        ("mask: [causal]", "mask must be an expression, written as text", "[causal]", (), "expression-text"),
        ("name: ../../etc/x", "name = ../../etc/x must be letters", "../../etc/x", ("etc_x",), "spec-name"),
        ("score: kv_idx <= q_idx", "score must be a number", "kv_idx <= q_idx", (), "expression-types"),
        ("gradients: [q, dk]", "gradients[1] = dk must be one of q, k, v", "dk", ("gradients: [q, k, v]",),
         "known-gradients"),
        ("gradients: [q, 1, v]", "gradients[1] = 1 must be q, k, v or a declared name", "1", ("gradients: [q, k, v]",),
         "known-gradients"),
        ("gradients: [[q], k, v]", "gradients[0] must be q, k, v or a declared name", "[q]", ("gradients: [q, k, v]",),
         "known-gradients"),
        ("gradients: [q, k, v, q]", "gradients[3] = q must stand there once", "q", ("gradients: [q, k, v]",),
         "unique-gradients"),
        ("gradients: [v, k]", "gradients must have q, k and v", "[v, k]", ("[q, k, v]",), "all-gradients"),
        ("gradients: q", "gradients = q must be a list: [q, k, v], or [] for none", "q", ("[q, k, v]",), "gradients"),
        ("deterministic: 1", "deterministic = 1 must be true or false", "1", ("true", "false"), "boolean"),
        ("gradients: {q: k}", "gradients must be a list", "{q: k}", ("[q, k, v]",), "gradients"),
        ("gradients:", "gradients is empty; it must be a list", "", ("[q, k, v]",), "gradients"),
        ("check: {seqlen_q: 1, seqlen_k: 1}", "check must be a list of shapes", "{seqlen_q: 1, seqlen_k: 1}", (),
         "check-shapes"),
        ("check: [128]", "check[0] = 128 must be a mapping of keys: batch, heads", "128", (), "spec-mapping"),
        ("check: [{seqlen_q: 4}]", "check[0].seqlen_k must be given", "{seqlen_q: 4}", ("seqlen_k: 128",),
         "required-keys"),
        ("check: [{seqlen_q: 4, seqlen_k: -1}]", "check[0].seqlen_k = -1 must be an integer from 0 to 2^30 - 512", "-1",
         ("0",), "length"),
        ("check: [{seqlen_q: 4, seqlen_k: 1073741313}]", "check[0].seqlen_k = 1073741313 must be", "1073741313",
         ("1073741312",), "length"),
        ("check: [{seqlen_q: 4, seqlen_k: 4, heads: 6, heads_kv: 4}]", "check[0].heads_kv = 4 must divide heads = 6",
         "4", ("3", "6"), "grouped-heads"),
    ],
)  # fmt: skip
def test_a_fault_says_where_what_which_rule_and_what_would_do(
    text: str, message: str, marked: str, nearest: tuple[str, ...], rule: str
) -> None:
    """One fault in one line: message, carets, nearest values and the rule's name."""
    fault = only(HEAD_DIM + text + "\n")
    assert fault.message.startswith(message) and fault.rule == rule and fault.nearest == nearest
    assert underlined(fault) == marked and fault.location is not None and fault.location.line == 2


def test_every_fault_of_e4m3_is_in_one_report() -> None:
    """Columns, matrix and promotion; what is said of formats, with the reasons."""
    found = faults(
        "problem: {head_dim: {qk: 72, v: 88}}\n"
        "precision: {inputs: e4m3, incoherent: hadamard, promote: 2}\n"
        "tensors: {q_descale: 'f32[batch]'}\n"
    )
    assert [(fault.path, fault.rule, fault.nearest) for fault in found] == [
        ("problem.head_dim.qk", "head-dim", ("64", "80")),
        ("problem.head_dim.v", "head-dim", ("80", "96")),
        ("precision.incoherent", "hadamard-columns", ("none",)),
        ("precision.promote", "promotion", ("1",)),
        ("tensors.q_descale", "reserved-names", ("q_descale_",)),
    ]
    assert found[0].message == "problem.head_dim.qk = 72 must be a multiple of 16 from 32 to 256"
    assert found[2].note == "the matrix is one of 64, 128 or 256 columns"
    assert "with the same instruction" in found[3].note
    assert found[4].note == "`q_descale` is an argument of calls with e4m3 tensors"


def test_gradients_that_are_not_there_yet_are_refused_with_the_reason() -> None:
    """Of some inputs alone, and of e4m3 inputs."""
    assert "of the tensors that require grad" in only(f"{HEAD_DIM}gradients: [q, v]\n").note
    of_e4m3 = only(f"{HEAD_DIM}precision: {{inputs: e4m3, output: f16}}\ngradients: [v, k, q]\n")
    assert (of_e4m3.rule, of_e4m3.nearest) == ("output-with-gradients", ("bf16", "f32"))
    assert "must be bf16, gradients of e4m3 inputs are worked out in it" in of_e4m3.message
    other = only(f"{HEAD_DIM}precision: {{inputs: bf16, output: f16}}\ngradients: [q, k, v]\n")
    assert (other.rule, other.nearest) == ("output-with-gradients", ("bf16", "f32"))


DECLARES = """
scalars: {cap: f32, n: i32, low: f32}
tensors: {bias: 'f32[num_heads_q]', doc: 'i32[batch, seqlen_k]', far: 'f16[batch]', twice: 'f32[m]', own: 'bf16[w]'}
mask: document(doc) and kv_idx > q_idx - i32(far[b])
score: >
  softcap(score, cap) + bias[h] + twice[q_idx] * twice[kv_idx] + own[i32(score)]
  + where(score > low, score, f32(n))
"""


@pytest.mark.parametrize(
    ("name", "rule", "words", "note"),
    [
        ("bais", "known-gradients", "must be one of q, k, v, cap, n, low, bias", "of what the score reads"),
        (
            "doc",
            "float-gradients",
            "must be declared as f16, bf16 or f32",
            "`doc` is i32, and has no derivative",
        ),
        ("n", "float-gradients", "must be declared as f16, bf16 or f32", "`n` is i32"),
        ("far", "gradients-of-scores", "must be read by the score", "the mask alone reads it"),
        ("low", "gradients-of-scores", "other than in conditions and indices", "moves in steps with `low`"),
        (
            "twice",
            "one-lookup",
            "must be read by one lookup",
            "it is read as `twice[q_idx]` and `twice[kv_idx]`",
        ),
        ("own", "gradient-index", "that do not depend on the score", "it is read as `own[i32(score)]`"),
    ],
)
def test_of_what_a_spec_declares_only_numbers_of_the_score_have_gradients(
    name: str, rule: str, words: str, note: str
) -> None:
    """Each other name is told at its place, with the list that is left; cap and bias are legal."""
    found = only(f"{HEAD_DIM}{DECLARES}gradients: [cap, {name}, q, k, v, bias]\n")
    assert (found.path, underlined(found), found.rule) == ("gradients[1]", name, rule)
    assert words in found.message and note in found.note
    assert found.nearest == ("gradients: [q, k, v, cap, bias]",)


@pytest.mark.parametrize("block", ["scalars", "tensors", "define"])
@pytest.mark.parametrize("name", ["q_descale", "k_descale", "v_descale"])
def test_descales_are_nobodys_names(block: str, name: str) -> None:
    """Calls pass them, so that nothing that a spec declares is called so, whatever its inputs are."""
    text = {"scalars": "f32", "tensors": "f32[batch]", "define": "q_pos"}[block]
    assert only(f"{HEAD_DIM}{block}:\n  {name}: {text}\n").rule == "reserved-names"


def test_the_simulator_takes_e4m3_of_any_head_dim() -> None:
    """Nothing is copied there; a Hadamard matrix is of the same sizes everywhere."""
    problem = "target: simulator\nproblem: {head_dim: 5}\n"
    attngen.load(problem + "precision: {inputs: e4m3}\n")
    assert only(problem + "precision: {inputs: e4m3, incoherent: hadamard}\n").rule == "hadamard-columns"


@pytest.mark.parametrize(
    ("head_dim", "target", "marked", "nearest"),
    [
        ("100", "auto", ["100"], ("96", "104")),
        ("33", "sm_80", ["33"], ("32", "40")),
        ("16", "sm_90a", ["16"], ("32",)),
        ("300", "sm_120", ["300"], ("256",)),
        ("{qk: 192, v: 100}", "auto", ["100"], ("96", "104")),
        ("{qk: 100, v: 128}", "auto", ["100"], ("96", "104")),
        ("513", "simulator", ["513"], ("512",)),
        ("0", "simulator", ["0"], ("1",)),
        ("9" * 600, "auto", ["9" * 600], ("256",)),
    ],
)
def test_an_impossible_head_dim_names_its_neighbours(
    head_dim: str, target: str, marked: list[str], nearest: tuple[str, ...]
) -> None:
    """The largest legal value below and the smallest above, told once however YAML gives the number."""
    found = faults(f"problem: {{head_dim: {head_dim}}}\ntarget: {target}\n")
    assert [underlined(fault) for fault in found] == marked
    assert found[0].rule == "head-dim" and found[0].nearest == nearest and len(str(found[0].message)) < 200


@pytest.mark.parametrize("head_dim", [1, 2, 3, 31, 100, 257, 512])
def test_the_simulator_takes_any_head_dim(head_dim: int) -> None:
    """Blocks that no GPU has run are what it is for."""
    spec = attngen.load({"problem": {"head_dim": head_dim}, "target": "simulator"})
    assert spec.problem.head_dim.qk == spec.problem.head_dim.v == head_dim


@pytest.mark.parametrize("head_dim", ["64.0", '"64"', "[64]", "true", "{qk: 64.0, v: 64}", "-8"])
def test_a_head_dim_of_the_wrong_type_is_told_once(head_dim: str) -> None:
    """One value, one fault, though it stands for two fields of the schema."""
    assert only(f"problem: {{head_dim: {head_dim}}}\n").path.startswith("problem.head_dim")


@pytest.mark.parametrize(
    ("text", "column", "path"),
    [
        ("mask: causal\n", 1, "problem.head_dim"),
        ("name: x\nproblem: {}\n", 1, "problem.head_dim"),
        ("problem: {head_dim: {qk: 64}}\n", 11, "problem.head_dim.v"),
    ],
)
def test_what_is_missing_is_missed_where_it_should_stand(text: str, column: int, path: str) -> None:
    """The caret is on the block that lacks the key, or on the first line."""
    fault = only(text)
    assert fault.message == f"{path} must be given" and fault.rule == "required-keys"
    assert fault.location is not None and fault.location.column == column


@pytest.mark.parametrize(
    ("text", "marked", "rule"),
    [
        ("tile: &t {block_m: 64}", "&t", "yaml-plain"),
        ("tile: {block_m: *m}", "*m", "yaml-plain"),
        ("tile: {block_m: !!int 64}", "!!int", "yaml-plain"),
        ("name: !local x", "!local", "yaml-plain"),
        ("name: ! x", "!", "yaml-plain"),
        ("<<: {name: x}", "<<", "yaml-plain"),
        ("tile: {<<: {block_m: 64}}", "<<", "yaml-plain"),
        ("problem: {head_dim: 64}", "problem", "unique-keys"),
        ("tile: {block_m: 64, block_n: 64, block_m: 32}", "block_m", "unique-keys"),
        ("? [a, b]\n: c", "[a, b]", "yaml-keys"),
        ("tile: [", "", "yaml-syntax"),
        ("name: 'x", "", "yaml-syntax"),
        ("\tname: x", "\t", "yaml-syntax"),
        ("---\nname: x", "-", "yaml-syntax"),
        ("name: a\x07b", "\x07", "yaml-characters"),
        ("check: " + "[" * 400, "[", "yaml-nesting"),
    ],
)
def test_yaml_that_a_spec_is_not_written_in_is_refused(text: str, marked: str, rule: str) -> None:
    """Anchors, aliases, tags, merge keys, duplicates and what is no YAML, each under its own rule."""
    fault = only(HEAD_DIM + text + "\n")
    assert fault.rule == rule and underlined(fault) == marked


def test_anchor_and_alias_are_both_told_and_nothing_is_told_twice() -> None:
    """The value an alias stands for is not missed as well, in a mapping or in a list."""
    found = faults(
        "problem: {head_dim: &d 64}\ntile: {block_m: *d}\ncheck: [*d, {seqlen_q: 1, seqlen_k: 1}]\n"
    )
    assert [underlined(fault) for fault in found] == ["&d", "*d", "*d"]
    assert [fault.rule for fault in found] == ["yaml-plain"] * 3


@pytest.mark.parametrize(
    "expression",
    ["kv_idx <= q_idx + 3", "window(128, 0)", "window(128, 0, 1) and b < 1", "not causal"],
)
def test_inside_braces_an_expression_must_be_quoted(expression: str) -> None:
    """YAML would end it at a comma; the error shows the whole expression in quotes, and no fragment as a key."""
    fault = only(f"{{problem: {{head_dim: 64}}, mask: {expression}}}")
    assert fault.rule == "quoted-expressions" and underlined(fault) == expression
    assert fault.nearest == (f'mask: "{expression}"',)


def test_inside_braces_a_word_and_a_quoted_expression_stand() -> None:
    """What YAML cannot tear apart needs no quotes."""
    assert attngen.load("{problem: {head_dim: 64}, mask: causal}").mask == "causal"
    assert attngen.load("{problem: {head_dim: 64}, mask: 'kv_idx <= q_idx'}").mask == "kv_idx <= q_idx"


def test_a_bracket_that_breaks_the_braces_asks_for_quotes() -> None:
    """Where YAML gives up at a bracket of the expression, the error still says what to do."""
    assert "must be quoted" in only("{problem: {head_dim: 64}, mask: ids[b] < 1}").note


def test_all_violations_stand_in_one_report_in_the_order_of_the_text() -> None:
    """Ten faults of every kind, each at its line and column."""
    found = faults(
        "name: x\ntarget: sm_90\nproblem: {head_dim: 100}\nmask: kv_idx <= q_indx and hh < 1\n"
        "tile: {block_m: on, blok: 3}\ntile: 3\nscore: scor * 2\nschedule:\n  kind: &k pingpang\n  stages: 0\n"
    )
    places = [(fault.location.line, fault.location.column) for fault in found if fault.location]
    assert places == [
        (2, 9),
        (3, 21),
        (4, 17),
        (4, 28),
        (5, 17),
        (5, 21),
        (6, 1),
        (7, 8),
        (9, 9),
        (9, 9),
        (10, 11),
    ]
    assert len(places) == len(found) == 11


def test_faults_of_expressions_alone_are_an_expression_error() -> None:
    """Both texts are read, and a fault elsewhere makes it a spec error."""
    with pytest.raises(attngen.ExpressionError) as caught:
        attngen.load(HEAD_DIM + "mask: b\nscore: b == 1\n")
    assert [fault.path for fault in caught.value.diagnostics] == ["mask", "score"]
    with pytest.raises(attngen.SpecError) as both:
        attngen.load("mask: b\n")
    assert type(both.value) is attngen.SpecError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the spec is empty"),
        ("\n  \n", "the spec is empty"),
        ("# only a comment\n", "the spec is empty"),
        ("---\n...\n", "the spec is empty"),
        ("- 1\n- 2\n", "the text is not a spec"),
        ("Dear reader,\nthis is prose.\n", "the text is not a spec"),
        ("#include <cuda.h>\nint main() { return 0; }\n", "the text is not a spec"),
    ],
)
def test_what_is_no_mapping_is_no_spec(text: str, message: str) -> None:
    """One fault, with the smallest spec as its cure."""
    fault = only(text)
    assert fault.message == message and fault.nearest == ("problem: {head_dim: 128}",)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """Missing, a folder, binary, too large: an error that names the file and the reason."""
    (tmp_path / "causal.yaml").write_text(HEAD_DIM)
    (tmp_path / "binary.yaml").write_bytes(b"a: 1\nb: \x89PNG\n\x00")
    (tmp_path / "large.yaml").write_bytes(b"#" * (1 << 20) + b"\n")
    missing = only(tmp_path / "casual.yaml")
    assert missing.nearest == (str(tmp_path / "causal.yaml"),) and "No such file" in missing.message
    assert only(str(tmp_path / "casual.yaml")) == missing
    binary = only(tmp_path / "binary.yaml")
    assert binary.location is not None and (binary.location.line, binary.location.column) == (2, 4)
    assert "not a text" in binary.message and "0x89" in binary.note
    assert "larger than 1 MiB" in only(tmp_path / "large.yaml").message
    assert "irectory" in only(tmp_path).message


@pytest.mark.parametrize("name", ["fa2_d65", "../pyproject", "x" * 5000, "a\0b", ".", "specs/", "/"])
def test_an_unknown_name_lists_the_nearest_shipped_specs(name: str) -> None:
    """Neither a file nor a shipped spec, whatever the string holds."""
    fault = only(name)
    assert fault.rule == "spec-file" and set(fault.nearest) <= set(shipped_names())
    assert fault.nearest and len(fault.message) < 300


@pytest.mark.parametrize("source", [None, 5, b"problem: {head_dim: 64}", ["a"]])
def test_what_is_no_source_at_all_is_an_argument_error(source: Any) -> None:
    """Got and expected, as for any argument of a call."""
    with pytest.raises(attngen.ArgumentError, match="argument spec: got"):
        attngen.load(source)


@pytest.mark.parametrize("head_dim", ["2", "6", "{qk: 64, v: 100}"])
def test_an_arch_in_place_of_the_target_is_held_to_the_same_rules(head_dim: str) -> None:
    """What the simulator takes is refused for a GPU as if the spec named it, at the head_dim as it was written."""
    text = f"problem: {{head_dim: {head_dim}}}\ntarget: "
    expected = only(f"{text}sm_90a\n")
    attngen.compile(f"{text}simulator\n")
    with pytest.raises(attngen.SpecError) as caught:
        attngen.compile(f"{text}simulator\n", arch="sm_90a")
    assert caught.value.diagnostics == (expected,) and expected.rule == "head-dim"
