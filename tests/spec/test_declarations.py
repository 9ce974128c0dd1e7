"""The blocks scalars, tensors and define: what they give, and every fault of theirs at its place."""

import copy
import inspect
import pickle
import warnings
from typing import Any

import pytest

import attngen
from attngen.errors import Diagnostic, SpecWarning
from attngen.expr.declarations import Declarations, Definition, Scalar, TensorType
from attngen.spec import json_schema

HEAD_DIM = "problem: {head_dim: 64}\n"
TEXT = """\
problem: {head_dim: 64}
scalars:
  cap: f32 = 30.0
  width: i32
  is_strict: bool = false
tensors:
  doc: i32[batch, seqlen_k]
  slopes: f32[num_heads_q]
  table: bf16[num_heads_q, 2, buckets]
define:
  band(width): "kv_idx > q_pos - width and kv_idx <= q_pos"
  half: q_pos // 2
  bucket: 3
mask: >
  (band(width) or kv_idx < half and not is_strict)
  and doc[b, kv_idx] == doc[b, q_pos]
score: tanh(score / cap) * cap + slopes[h] * (kv_idx - q_pos) + table[h, 0, bucket]
"""


def faults(source: Any) -> tuple[Diagnostic, ...]:
    with pytest.raises(attngen.SpecError) as caught:
        attngen.load(source)
    return caught.value.diagnostics


def only(source: Any) -> Diagnostic:
    found = faults(source)
    assert len(found) == 1, "\n".join(fault.draw() for fault in found)
    return found[0]


def underlined(fault: Diagnostic) -> str:
    """What the carets of a fault mark in its source line."""
    place = fault.location
    assert place is not None
    return place.text[place.column - 1 :][: place.length]


def test_declarations_are_read_from_their_texts() -> None:
    """Types, defaults, dimensions and heads, each from its own text whatever YAML would make of it."""
    assert attngen.load(TEXT).declarations == Declarations(
        {
            "cap": Scalar("cap", "f32", 30.0),
            "width": Scalar("width", "i32"),
            "is_strict": Scalar("is_strict", "bool", False),
        },
        {
            "doc": TensorType("doc", "i32", ("batch", "seqlen_k")),
            "slopes": TensorType("slopes", "f32", ("num_heads_q",)),
            "table": TensorType("table", "bf16", ("num_heads_q", 2, "buckets")),
        },
        {
            "band": Definition("band", ("width",), "kv_idx > q_pos - width and kv_idx <= q_pos"),
            "half": Definition("half", (), "q_pos // 2"),
            "bucket": Definition("bucket", (), "3"),
        },
    )


def test_a_spec_with_declarations_comes_back_from_its_yaml_its_dict_and_its_pickle() -> None:
    """Nothing is lost, and what is equal has one hash."""
    spec = attngen.load(TEXT)
    for same in (
        attngen.load(spec.to_yaml()),
        attngen.load(spec.to_dict()),
        pickle.loads(pickle.dumps(spec)),
        copy.deepcopy(spec),
        spec.replace({"name": ""}),
    ):
        assert same == spec and hash(same) == hash(spec) and same.declarations == spec.declarations
        assert same.mask_expr is spec.mask_expr and same.score_expr is spec.score_expr
    assert spec.to_dict()["tensors"]["doc"] == "i32[batch, seqlen_k]"
    assert set(attngen.load(HEAD_DIM).to_dict()) == {"problem"}


def test_the_digest_is_of_what_is_read_not_of_how_it_is_named() -> None:
    """Definitions count by their meaning; a default, a format and a dimension count as they are."""
    spec = attngen.load(TEXT)
    inlined = {"define": {}, "mask": str(spec.mask_expr), "score": str(spec.score_expr)}
    for same in ({"scalars.cap": "f32=3e1"}, {"tensors.doc": "i32 [ batch,seqlen_k ]"}, inlined):
        assert spec.replace(same).digest() == spec.digest()
    for other in (
        {"scalars.cap": "f32"},
        {"scalars.cap": "f32 = 20.0"},
        {"tensors.slopes": "bf16[num_heads_q]"},
        {"tensors.table": "bf16[num_heads_q, 2, 32]"},
        {"define.half": "q_pos // 3"},
    ):
        assert spec.replace(other).digest() != spec.digest()


@pytest.mark.parametrize(
    ("text", "message", "marked", "nearest", "rule"),
    [
        ("cap: f33", "scalars.cap = f33 must be one of f32, i32, bool", "f33", ("f32",), "scalar-types"),
        ("cap: float = 2", "scalars.cap = float = 2 must be one of", "float = 2", ("f32 = 2",), "scalar-types"),
        ("cap: bf16", "scalars.cap = bf16 must be one of", "bf16", ("f32",), "scalar-types"),
        ("cap: 30.0", "scalars.cap = 30.0 must be one of", "30.0", ("f32 = 30.0",), "scalar-types"),
        ("cap: 30", "scalars.cap = 30 must be one of", "30", ("i32 = 30", "f32 = 30"), "scalar-types"),
        ("cap: true", "scalars.cap = true must be one of", "true", ("bool = true",), "scalar-types"),
        ("cap:", "scalars.cap is empty; it must be one of", "", ("f32", "i32", "bool"), "scalar-types"),
        ("cap: f32 = x", "scalars.cap = f32 = x must default to a number", "x", ("f32 = 0.0",), "scalar-defaults"),
        ("cap: f32 = nan", "scalars.cap = f32 = nan must default", "nan", ("f32 = 0.0",), "scalar-defaults"),
        ("cap: f32 = 1e39", "scalars.cap = f32 = 1e39 must default", "1e39", ("f32 = 3.4028234663852886e+38",),
         "scalar-defaults"),
        ("cap: i32 = 2147483648", "scalars.cap = i32 = 2147483648 must default to an integer from -2^31 to 2^31 - 1",
         "2147483648", ("i32 = 2147483647",), "scalar-defaults"),
        ("cap: 'i32 =  2.6'", "scalars.cap = i32 = 2.6 must default to", "2.6", ("i32 = 2",), "scalar-defaults"),
        ("cap: bool = 1", "scalars.cap = bool = 1 must default to true or false", "1",
         ("bool = true", "bool = false"), "scalar-defaults"),
        ("kv_idx: i32", "scalars.kv_idx must be called otherwise", "kv_idx", ("kv_idx_",), "reserved-names"),
        ("batch: i32", "scalars.batch must be called otherwise", "batch", ("batch_",), "reserved-names"),
        ("let: i32", "scalars.let must be called otherwise", "let", ("let_",), "reserved-names"),
        ("tanh: f32", "scalars.tanh must be called otherwise", "tanh", ("tanh_",), "reserved-names"),
        ("softmax_scale: f32", "scalars.softmax_scale must be called otherwise", "softmax_scale", ("softmax_scale_",),
         "reserved-names"),
        ("my cap: f32", "scalars.my cap must be called by a name", "my cap", ("my_cap",), "declared-names"),
        ("cap: [f32]", "scalars.cap must be the text of a type", "[f32]", ("f32",), "scalar-types"),
    ],
)  # fmt: skip
def test_faults_of_scalars(text: str, message: str, marked: str, nearest: tuple[str, ...], rule: str) -> None:
    """Type, default and name, with the nearest declaration that would do."""
    fault = only(f"{HEAD_DIM}scalars:\n  {text}\nmask: causal\n")
    assert fault.message.startswith(message) and fault.rule == rule and fault.nearest == nearest
    assert underlined(fault) == marked and fault.location is not None and fault.location.line == 3


@pytest.mark.parametrize(
    ("text", "message", "marked", "nearest", "rule"),
    [
        ("doc: int[batch]", "tensors.doc = int[batch] must hold one of", "int", ("i32",), "tensor-types"),
        ("doc: half[batch]", "tensors.doc = half[batch] must hold one of", "half", ("f16",), "tensor-types"),
        ("doc: i32", "tensors.doc = i32 must be a number format and the dimensions", "i32",
         ("i32[batch, seqlen_k]",), "tensor-types"),
        ("doc: i32[]", "tensors.doc = i32[] must have dimensions", "i32[]", ("i32[batch]",), "tensor-dimensions"),
        ("doc: i32[batch, 0]", "tensors.doc = i32[batch, 0] has a dimension that is no size", "0", ("1",),
         "tensor-dimensions"),
        ("doc: i32[-4]", "tensors.doc = i32[-4] has a dimension", "-4", ("1",), "tensor-dimensions"),
        ("doc: i32[batch, kv_idx]", "tensors.doc = i32[batch, kv_idx] has a dimension", "kv_idx", ("seqlen_k",),
         "tensor-dimensions"),
        ("doc: i32[seqlen_k + 1]", "tensors.doc = i32[seqlen_k + 1] has a dimension", "seqlen_k + 1",
         ("seqlen_k", "seqlen_q"), "tensor-dimensions"),
        ("doc: i32[doc]", "tensors.doc = i32[doc] has a dimension", "doc", ("num_doc",), "tensor-dimensions"),
        ("doc: i32[seqlen_k] sort", "tensors.doc = i32[seqlen_k] sort must end with its dimensions", "sort",
         ("sorted",), "tensor-types"),
        ("doc: f32[seqlen_k] sorted", "tensors.doc = f32[seqlen_k] sorted must hold integers", "f32",
         ("i32[seqlen_k] sorted", "f32[seqlen_k]"), "sorted-tensors"),
        ("doc: bool[seqlen_q] sorted", "tensors.doc = bool[seqlen_q] sorted must hold integers", "bool",
         ("i32[seqlen_q] sorted", "bool[seqlen_q]"), "sorted-tensors"),
        ("doc: i32[seqlen_k, batch] sorted", "tensors.doc = i32[seqlen_k, batch] sorted is sorted along its last",
         "batch", ("seqlen_q", "seqlen_k"), "sorted-tensors"),
        ("doc: u8[batch, 128] sorted", "tensors.doc = u8[batch, 128] sorted is sorted along its last", "128",
         ("seqlen_q", "seqlen_k"), "sorted-tensors"),
        ("v: i32[batch]", "tensors.v must be called otherwise", "v", ("v_",), "reserved-names"),
        ("score: f32[batch]", "tensors.score must be called otherwise", "score", ("score_",), "reserved-names"),
        ("tensors: f32[batch]", "tensors.tensors must be called otherwise", "tensors", ("tensors_",), "reserved-names"),
    ],
)  # fmt: skip
def test_faults_of_tensors(text: str, message: str, marked: str, nearest: tuple[str, ...], rule: str) -> None:
    """Format, dimensions and name; an index in the place of a size names the size."""
    fault = only(f"{HEAD_DIM}tensors:\n  {text}\nmask: causal\n")
    assert fault.message.startswith(message) and fault.rule == rule and fault.nearest == nearest
    assert underlined(fault) == marked and fault.location is not None and fault.location.line == 3


@pytest.mark.parametrize(
    ("head", "message", "nearest", "rule"),
    [
        ("band()", "define.band() must have parameters", ("band",), "definition-heads"),
        ("band(a, a)", "define.band(a, a) has two parameters `a`", (), "definition-heads"),
        ("band(a b)", "define.band(a b) has `a b` for a parameter", ("a_b",), "definition-heads"),
        ("band(kv_idx)", "define.band(kv_idx) has `kv_idx` for a parameter", ("kv_idx_",), "reserved-names"),
        ("band(a=b)", "define.band(a=b) has `b` for a default", (), "definition-heads"),
        (
            "band(a=2147483648)",
            "define.band(a=2147483648) has `2147483648` for a default",
            ("2147483647",),
            "number-range",
        ),
        (
            "band(a=-2147483649)",
            "define.band(a=-2147483649) has `-2147483649` for a default",
            ("-2147483648",),
            "number-range",
        ),
        ("band(a=)", "define.band(a=) has `` for a default", (), "definition-heads"),
        ("band(a=1, c)", "define.band(a=1, c) has `c` after one with a default", (), "definition-heads"),
        ("band(a", "define.band(a must be a name or a name(p, q)", ("band",), "definition-heads"),
        ("my band", "define.my band must be called by a name", ("my_band",), "declared-names"),
        ("exp(x)", "define.exp(x) must be called otherwise", ("exp_",), "reserved-names"),
        ("not", "define.not must be called otherwise", ("not_",), "reserved-names"),
    ],
)
def test_faults_of_the_heads_of_definitions(
    head: str, message: str, nearest: tuple[str, ...], rule: str
) -> None:
    """The name and the parameters, underlined with the whole key."""
    fault = faults(f"{HEAD_DIM}define:\n  {head}: q_pos\nmask: causal\n")[0]
    assert fault.message == message and fault.rule == rule and fault.nearest == nearest
    assert underlined(fault) == head


def test_a_name_is_declared_once_across_the_blocks() -> None:
    """The second of a scalar, a tensor and a definition by one name is told, with the line of the first."""
    found = faults(
        HEAD_DIM + "tensors:\n  x: f32[batch]\ndefine:\n  x: q_pos\n  y(a): a\n  y: 1\nscalars:\n  x: f32\n"
    )
    assert [(fault.rule, fault.path, fault.note) for fault in found] == [
        ("unique-names", "tensors.x", "first declared in line 9"),
        ("unique-names", "define.x", "first declared in line 9"),
        ("unique-names", "define.y", "first declared in line 6"),
    ]


def test_what_a_definition_does_wrong_is_marked_in_the_file() -> None:
    """An unknown name where it stands, once though mask and score both read it; syntax also where nothing does."""
    found = faults(
        HEAD_DIM + "define:\n  half: q_ops // 2\n  'odd(x)': \"x % 2 == one\"\n  unused: 3 +\n"
        "mask: odd(kv_idx) and kv_idx < half\nscore: score + half\n"
    )
    assert [(underlined(fault), fault.location.line if fault.location else 0) for fault in found] == [
        ("q_ops", 3),
        ("one", 4),
        ("", 5),
    ]
    with pytest.raises(attngen.ExpressionError):
        attngen.load(HEAD_DIM + "define:\n  half: q_ops // 2\nmask: kv_idx < half\n")


def test_the_last_parameters_may_have_defaults() -> None:
    """Numbers and truth values, for calls that leave them out."""
    define = (
        'define:\n  "near(width, shift = -2, both = true)": abs(kv_idx - q_pos + shift) < width and both\n'
    )
    short, whole = (attngen.load(HEAD_DIM + define + f"mask: near(4{rest})\n") for rest in ("", ", -2, true"))
    assert short.mask_expr is whole.mask_expr
    assert attngen.load(HEAD_DIM + define + "mask: near(4, 0)\n").mask_expr is not short.mask_expr
    for call in ("near(4, 0, true, 1)", "near"):
        fault = only(HEAD_DIM + define + f"mask: {call}\n")
        assert "near(width, shift = -2, both = true)" in fault.message + "".join(fault.nearest)
    assert "takes 1 to 3 arguments" in only(HEAD_DIM + define + "mask: near(4, 0, true, 1)\n").note


def test_one_mistake_is_told_once() -> None:
    """What reads a faulty declaration, through definitions too, is not missed as an unknown name."""
    text = "scalars:\n  w: i33\ndefine:\n  far: kv_idx - w\n  near(x): x < far\nmask: near(2)\nscore: score * w\n"
    assert [fault.path for fault in faults(HEAD_DIM + text)] == ["scalars.w"]
    fault = only(HEAD_DIM + "define:\n  far: kv_idx - ww\nmask: far < 3\n")
    assert underlined(fault) == "ww"


def test_all_faults_of_a_spec_stand_in_one_report() -> None:
    """Those of declarations, of expressions that do not read them, and of other fields, in the order of the text."""
    found = faults(
        HEAD_DIM.replace("64", "65")
        + "scalars:\n  w: i33\ntensors:\n  t: f32[0]\ndefine:\n  a: 1 +\nmask: kv_idx < nope\nscore: score +\n"
    )
    assert [fault.location.line for fault in found if fault.location] == [1, 3, 5, 7, 8, 9]


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("scalars:\n  w: i32 = 3\n", "scalars.w"),
        ("tensors:\n  doc: i32[batch, seqlen_k]\n", "tensors.doc"),
        (
            "tensors:\n  doc: i32[batch, seqlen_k]\ndefine:\n  same: doc[b, kv_idx] == doc[b, q_pos]\n",
            "tensors.doc",
        ),
    ],
)
def test_what_no_expression_reads_is_an_error(text: str, path: str) -> None:
    """Every call would have to pass it for nothing; a definition that nothing uses does not read it."""
    fault = only(HEAD_DIM + text)
    assert fault.rule == "unread-declarations" and fault.path == path
    assert fault.message == f"neither mask nor score reads {path}"


def test_a_definition_that_nothing_uses_is_no_fault() -> None:
    """It costs no call anything."""
    assert attngen.load(HEAD_DIM + "define:\n  half: q_pos // 2\n").define == {"half": "q_pos // 2"}


def test_a_score_that_ignores_the_score_is_warned_of() -> None:
    """At its place; the spec is legal."""
    with pytest.warns(SpecWarning) as caught:
        attngen.load(HEAD_DIM + "score: 0.5 * (kv_idx - q_pos)\n")
    (warning,) = caught
    assert isinstance(warning.message, SpecWarning)
    assert underlined(warning.message.diagnostic) == "0.5 * (kv_idx - q_pos)"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attngen.load(TEXT)


@pytest.mark.parametrize(
    "mask",
    [
        "window(-1, 0)", "window(-1, -1)", "window(-5, 2)", "causal and window(-1, 0)", "kv_idx < 0", "sinks(0)",
        "false", "not full", "kv_idx % 4 == 5", "kv_idx >= 3 and kv_idx < 3", "abs(kv_idx - q_pos) < 0",
        "sinks(0) or h < 0", "neighbourhood(8, -1)", "doc[b, kv_idx] < 3 and q_idx < 0", "max(kv_idx, 4) == 3",
    ],
)  # fmt: skip
def test_a_mask_that_shows_nothing_is_warned_of(mask: str) -> None:
    """Once, at its place, when the spec is read; -1 is a length. What the call decides is no matter of this."""
    tensors = "tensors: {doc: 'i32[batch, seqlen_k]'}\n" if "doc" in mask else ""
    with pytest.warns(SpecWarning) as caught:
        spec = attngen.load(f"{HEAD_DIM}{tensors}mask: {mask}\n")
        spec.replace({"target": "simulator"})
    (warning,) = caught
    assert isinstance(warning.message, SpecWarning)
    assert ("-1 is a length" in str(warning.message)) == ("window" in mask)
    assert underlined(warning.message.diagnostic) == mask
    assert warning.message.diagnostic.rule == "mask-shows-nothing" and warning.filename == __file__
    with pytest.warns(SpecWarning, match="shows no key"):
        attngen.load(HEAD_DIM).replace({"mask": "false"})


@pytest.mark.parametrize(
    "mask", ["window(left, 0)", "kv_idx < left", "kv_idx < 1", "q_idx > 5", "window(0, 0)"]
)
def test_a_mask_that_may_show_something_is_not_warned_of(mask: str) -> None:
    """By a scalar of the call, or at some lengths."""
    scalars = "scalars: {left: i32}\n" if "left" in mask else ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attngen.load(f"{HEAD_DIM}{scalars}mask: {mask}\n")


@pytest.mark.parametrize(
    ("text", "marked", "nearest"),
    [
        ("define: {half: q_pos // 2}", "q_pos // 2", 'define.half: "q_pos // 2"'),
        ("define: {low: min(q_pos, 3)}", "min(q_pos, 3)", 'define.low: "min(q_pos, 3)"'),
        ("define: {band(p, q): 'p < q'}", "band(p, q)", '"band(p, q)": ...'),
    ],
)
def test_inside_braces_expressions_and_heads_must_be_quoted(text: str, marked: str, nearest: str) -> None:
    """YAML would end them at a comma."""
    fault = only(f"{HEAD_DIM}{text}\n")
    assert fault.rule == "quoted-expressions" and underlined(fault) == marked and fault.nearest == (nearest,)


def test_inside_braces_an_unquoted_tensor_is_refused_with_the_cure() -> None:
    """YAML gives up at its bracket."""
    assert "must be quoted" in only(HEAD_DIM + "tensors: {doc: i32[batch]}\n").note


def test_inside_braces_quoted_declarations_stand() -> None:
    """Quotes make any text one value."""
    spec = attngen.load(
        HEAD_DIM
        + 'scalars: {cap: f32 = 30.0}\ntensors: {t: "f32[num_heads_q, 2]"}\n'
        + "define: {'f(p, q)': 'p - q', g: 'min(q_pos, 3)'}\nscore: score + cap * t[h, f(g, 2)]\n"
    )
    assert set(spec.declarations.definitions) == {"f", "g"}


@pytest.mark.parametrize("marked", ["&a", "*a", "!!str"])
def test_anchors_aliases_and_tags_are_refused_in_declarations(marked: str) -> None:
    """As everywhere in a spec."""
    value = {"&a": "&a f32", "*a": "*a", "!!str": "!!str f32"}[marked]
    fault = faults(f"{HEAD_DIM}scalars:\n  cap: {value}\nscore: score * cap\n")[0]
    assert fault.rule == "yaml-plain" and underlined(fault) == marked


@pytest.mark.parametrize("block", ["scalars", "tensors", "define"])
@pytest.mark.parametrize("value", ["", "[a]", "f32"])
def test_a_block_is_a_mapping(block: str, value: str) -> None:
    """And nothing else."""
    fault = only(f"{HEAD_DIM}{block}: {value}\n")
    assert (
        fault.rule == "spec-mapping" and f"{block}" in fault.message and "a mapping of names" in fault.message
    )


@pytest.mark.parametrize(
    ("value", "nearest"), [(30.0, ("f32 = 30.0",)), (True, ("bool = true",)), (None, ("f32", "i32", "bool"))]
)
def test_a_dict_holds_declarations_as_texts(value: Any, nearest: tuple[str, ...]) -> None:
    """A value that is no text is told by its own path."""
    fault = only({"problem": {"head_dim": 64}, "scalars": {"cap": value}})
    assert fault.path == "scalars.cap" and fault.nearest == nearest


def test_the_json_schema_knows_the_blocks() -> None:
    """Names to texts, with the pattern of each text."""
    properties = json_schema()["properties"]
    for block in ("scalars", "tensors", "define"):
        assert properties[block]["type"] == "object" and properties[block]["description"]
        assert properties[block]["additionalProperties"]["type"] == "string"
    assert "f32" in properties["scalars"]["additionalProperties"]["pattern"]


@pytest.mark.parametrize("call", [attngen.Kernel.__call__, attngen.Kernel.backward, attngen.attention])
def test_no_argument_of_a_call_may_be_declared(call: Any) -> None:
    """What is declared is passed by its name, beside the arguments of a call, of a backward pass and of `attention`."""
    parameters = inspect.signature(call).parameters.values()
    named = [each.name for each in parameters if each.kind is not inspect.Parameter.VAR_KEYWORD]
    assert len(named) > 5
    for name in named:
        data = {
            "problem": {"head_dim": 64},
            "tensors": {name: "f32[batch]"},
            "score": f"score + {name}[b]",
        }
        with pytest.raises(attngen.SpecError, match=r"must be called otherwise|reserved-names"):
            attngen.load(data)


def test_sorted_is_said_behind_the_dimensions() -> None:
    """The word is part of the declaration: it is written back, has a digest of its own, and is no dimension."""
    texts = {text: f"{HEAD_DIM}tensors: {{doc: 'i32[batch, seqlen_k]{text}'}}\nmask: document(doc)\n"
             for text in ("", " sorted", "  sorted ", "sorted")}  # fmt: skip
    plain, *others = (attngen.load(text) for text in texts.values())
    assert len({each.digest() for each in others}) == 1 and others[0].digest() != plain.digest()
    assert all(each.declarations.sorted_tensors == {"doc"} for each in others)
    assert not plain.declarations.sorted_tensors
    assert str(others[0].declarations.tensors["doc"]) == "i32[batch, seqlen_k] sorted"
    assert attngen.load(others[0].to_yaml()).digest() == others[0].digest()
