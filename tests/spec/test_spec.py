"""The Spec: an immutable value that can be changed, written, compared and found again."""

import copy
import json
import pickle
from dataclasses import FrozenInstanceError
from typing import Any

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

import attngen
from attngen.spec import json_schema

TEXT = """\
name: small
problem:
  head_dim: 64
mask: causal
tile: {block_m: 64, block_n: 32}
check:
  - {seqlen_q: 4, seqlen_k: 5}
"""


def faults(call: Any, *arguments: Any) -> tuple[attngen.errors.Diagnostic, ...]:
    with pytest.raises(attngen.SpecError) as caught:
        call(*arguments)
    return caught.value.diagnostics


@pytest.mark.parametrize(
    ("path", "place", "marked"),
    [
        ("name", (1, 7), "small"),
        ("problem.head_dim", (3, 13), "64"),
        ("mask", (4, 7), "causal"),
        ("tile.block_n", (5, 30), "32"),
        ("tile", (5, 7), "{block_m: 64, block_n: 32}"),
        ("check[0].seqlen_k", (7, 29), "5"),
    ],
)
def test_every_value_knows_where_it_was_written(path: str, place: tuple[int, int], marked: str) -> None:
    """Line, column and length of values at every depth."""
    found = attngen.load(TEXT).locate(path)
    assert found is not None and (found.line, found.column) == place
    assert found.text[found.column - 1 :][: found.length] == marked


def test_what_was_not_written_has_no_place() -> None:
    """Defaults, unknown paths, and specs that came from no text."""
    assert attngen.load(TEXT).locate("schedule.kind") is None
    assert attngen.load(TEXT).locate("nothing.at.all") is None
    assert attngen.load({"problem": {"head_dim": 64}}).locate("problem.head_dim") is None


def test_a_replaced_value_loses_its_place_and_all_others_keep_theirs() -> None:
    """A later error about the block that was not replaced still points into the file."""
    spec = attngen.load(TEXT)
    changed = spec.replace({"tile.block_n": 16, "schedule.kind": "fa2"})
    assert (changed.tile.block_m, changed.tile.block_n, changed.schedule.kind) == (64, 16, "fa2")
    assert changed.locate("tile.block_n") is None and changed.locate("tile.block_m") == spec.locate(
        "tile.block_m"
    )
    assert spec.tile.block_n == 32 and spec.schedule.kind == "auto"
    assert spec.replace({"tile": {"block_m": 32}}).locate("tile.block_m") is None


@pytest.mark.parametrize(
    ("changes", "head_dims"),
    [
        ({"problem.head_dim": 128}, (128, 128)),
        ({"problem.head_dim.v": 128}, (64, 128)),
        ({"problem.head_dim.qk": 96}, (96, 64)),
        ({"problem.head_dim": {"qk": 192, "v": 128}}, (192, 128)),
        ({"problem.head_dim.qk": 192, "problem.head_dim.v": 128}, (192, 128)),
        ({"problem": {"head_dim": 32}}, (32, 32)),
    ],
)
def test_a_head_dim_is_replaced_in_every_way_it_is_written(changes: Any, head_dims: tuple[int, int]) -> None:
    """As a number, as two, and one of two."""
    found = attngen.load(TEXT).replace(changes).problem.head_dim
    assert (found.qk, found.v) == head_dims


def test_faults_of_replaced_values_are_drawn_in_a_text_of_their_own() -> None:
    """Every new value stands in a line under its dotted path, carets and all, in a file called <replace>."""
    found = faults(
        attngen.load(TEXT).replace,
        {"tile.block_n": -4, "mask": "kv_idx <= q_ixd", "schedul.kind": 4, "tile.blok": 3},
    )
    drawn = [(str(fault.location), fault.rule) for fault in found]
    assert drawn == [
        ("<replace>:1:15", "positive-integer"),
        ("<replace>:2:17", "known-names"),
        ("<replace>:3:1", "known-keys"),
        ("<replace>:4:1", "known-keys"),
    ]
    assert found[0].draw().splitlines()[1:3] == ["    1 | tile.block_n: -4", "      |               ^^"]


def test_a_dict_is_read_as_its_yaml_would_be() -> None:
    """Same values, same faults; a fault is drawn in the dict's own YAML."""
    data = {
        "problem": {"head_dim": {"qk": 192, "v": 128}},
        "mask": "causal",
        "check": ({"seqlen_q": 1, "seqlen_k": 2},),
    }
    assert attngen.load(data) == attngen.load(attngen.load(data).to_yaml())
    found = faults(attngen.load, {"problem": {"head_dim": 100}, "mask": "kv_idx && b", 5: 3})
    assert [str(fault.location) for fault in found] == ["<dict>:2:13", "<dict>:3:14", "<dict>:4:1"]


@pytest.mark.parametrize("value", [True, "64", 64.0, None, -1, [64], object(), float("nan"), {"x": 1}])
def test_a_dict_is_read_as_strictly_as_a_file(value: Any) -> None:
    """No value of another type is taken for an integer, and what has no YAML form is told without a crash."""
    (fault,) = faults(attngen.load, {"problem": {"head_dim": 64}, "tile": {"block_n": value}})
    assert fault.path.startswith("tile.block_n")


def test_a_dict_that_holds_itself_is_told_without_a_crash() -> None:
    """Recursion ends in an error of the spec."""
    data: dict[str, Any] = {"problem": {"head_dim": 100}}
    data["tile"] = data
    assert {fault.path for fault in faults(attngen.load, data)} >= {
        "problem.head_dim",
        "tile.problem",
        "tile.tile",
    }


def test_a_spec_is_an_immutable_value() -> None:
    """Equal specs have equal hashes wherever they were written; none can be changed in place."""
    spec, same = attngen.load(TEXT), attngen.load(attngen.load(TEXT).to_dict())
    assert spec == same and hash(spec) == hash(same) and len({spec, same}) == 1
    assert spec != spec.replace({"name": "other"})
    with pytest.raises(FrozenInstanceError):
        spec.mask = "full"  # type: ignore[misc]
    with pytest.raises(pydantic.ValidationError):
        spec.tile.block_m = 3  # type: ignore[misc]
    for twin in (pickle.loads(pickle.dumps(spec)), copy.deepcopy(spec)):
        assert (
            twin == spec and twin.locate("mask") == spec.locate("mask") and twin.mask_expr is spec.mask_expr
        )
    assert attngen.load(spec) is spec


@given(
    st.fixed_dictionaries(
        {"problem": st.fixed_dictionaries({"head_dim": st.sampled_from([64, {"qk": 192, "v": 128}])})},
        optional={
            "name": st.sampled_from(["x", "on", "123", "1e-3", "null"]),
            "target": st.sampled_from(["auto", "sm_90a", "simulator"]),
            "mask": st.sampled_from(
                ["true", "causal", "kv_idx <= q_idx # ", "b < 1 and\n h < 2", "(kv_idx < 3)"]
            ).map(lambda text: text.rstrip(" #")),
            "gradients": st.sampled_from([[], ["q", "k", "v"], ("v", "q", "k")]),
            "tile": st.fixed_dictionaries({}, optional={"block_m": st.sampled_from(["auto", 32, 1 << 20])}),
            "schedule": st.fixed_dictionaries({}, optional={"kind": st.sampled_from(["fa2", "serial"])}),
            "check": st.lists(
                st.fixed_dictionaries(
                    {"seqlen_q": st.integers(0, 9), "seqlen_k": st.integers(0, 9)},
                    optional={"heads": st.just(4), "heads_kv": st.sampled_from([1, 2, 4, None])},
                ),
                max_size=2,
            ),
        },
    )
)
def test_a_spec_comes_back_from_its_yaml_and_its_dict(data: Any) -> None:
    """to_yaml and to_dict lose nothing, whatever the values look like to YAML."""
    try:
        spec = attngen.load(data)
    except attngen.SpecError as fault:
        assert {diagnostic.rule for diagnostic in fault.diagnostics} == {"grouped-heads"}
        return
    assert attngen.load(spec.to_yaml()) == attngen.load(spec.to_dict()) == spec
    assert spec.name == data.get("name", "") and spec.mask == data.get("mask", "full")


def test_the_digest_is_of_the_meaning() -> None:
    """Names, check shapes and the spelling of a mask do not count; all else does."""
    spec = attngen.load(TEXT)
    digest = spec.digest()
    for same in ({"name": "other"}, {"check": []}, {"mask": "kv_idx <= q_idx + seqlen_k - seqlen_q"}):
        assert spec.replace(same).digest() == digest
    for other in ({"mask": "full"}, {"tile.block_m": 32}, {"problem.head_dim": 128}, {"target": "sm_80"}):
        assert spec.replace(other).digest() != digest
    assert len(digest) == 64 and int(digest, 16)


def test_a_sink_counts_where_there_is_one() -> None:
    """Without the key, or with `none`, a digest is what it was before there were sinks; it is no declaration."""
    spec = attngen.load("problem: {head_dim: 64}\n")
    assert spec.digest() == "f44c151bc2bd8d87123f2df4deea9e637977859e88e45c1de7b3f21d2cd15edb"
    with_sink = spec.replace({"sink": "per_head"})
    assert spec.replace({"sink": "none"}) == spec and spec.digest() == spec.replace({"sink": "none"}).digest()
    assert with_sink.digest() != spec.digest() and attngen.load(with_sink.to_yaml()) == with_sink
    assert with_sink.to_dict()["sink"] == "per_head" and "sink" not in spec.to_dict()
    assert not with_sink.declarations.tensors and list(with_sink.arguments.tensors) == ["sink"]
    assert spec.arguments is spec.declarations


@pytest.mark.parametrize("mask", ["sink[h] < 1.0", "kv_idx < sink"])
def test_expressions_do_not_read_a_sink(mask: str) -> None:
    """Nor may a spec declare another thing of that name."""
    with pytest.raises(attngen.SpecError, match="sink"):
        attngen.load({"problem": {"head_dim": 64}, "sink": "per_head", "mask": mask})
    with pytest.raises(attngen.SpecError, match="an argument of calls with a learned sink"):
        attngen.load({"problem": {"head_dim": 64}, "scalars": {"sink": "f32"}, "score": "score + sink"})


def test_gradients_are_in_one_order_and_count_where_there_are_any() -> None:
    """However they are written; without them a digest is what it was before specs could ask for them."""
    spec = attngen.load("problem: {head_dim: 64}\ngradients: [v, q, k]\n")
    assert spec.gradients == ("q", "k", "v") and spec.to_dict()["gradients"] == ["q", "k", "v"]
    assert spec == attngen.load({"problem": {"head_dim": 64}, "gradients": ("q", "k", "v")})
    declares = "scalars: {z: f32, a: f32}\nscore: score * z + a\n"
    more = attngen.load(f"problem: {{head_dim: 64}}\n{declares}gradients: [z, v, a, q, k]\n")
    assert more.gradients == ("q", "k", "v", "z", "a")
    without = spec.replace({"gradients": []})
    assert without == attngen.load({"problem": {"head_dim": 64}}) and without.gradients == ()
    assert without.to_dict() == {"problem": {"head_dim": 64}}
    assert spec.digest() != without.digest()
    assert without.replace({"deterministic": True}).digest() == without.digest()
    assert without.replace({"deterministic": False}).digest() != without.digest()
    assert without.digest() == "f44c151bc2bd8d87123f2df4deea9e637977859e88e45c1de7b3f21d2cd15edb"


def test_the_json_schema_knows_every_key_and_its_words() -> None:
    """Editors complete from it: no other key, closed sets as enums, bounds, a description of every key."""
    schema = json_schema()
    json.dumps(schema)
    blocks = {"": schema, **schema["$defs"]}
    assert all(block["additionalProperties"] is False for block in blocks.values())
    for block in blocks.values():
        assert block["description"] and all(
            "description" in value or "$ref" in value for value in block["properties"].values()
        )
    assert schema["required"] == ["problem"] and "sm_90a" in schema["properties"]["target"]["enum"]
    assert schema["$defs"]["Tile"]["properties"]["block_m"]["anyOf"][0] == {"minimum": 1, "type": "integer"}
    assert schema["$defs"]["Problem"]["properties"]["head_dim"]["anyOf"][0]["type"] == "integer"
    gradients = schema["properties"]["gradients"]
    assert gradients["items"]["examples"] == ["q", "k", "v"] and gradients["uniqueItems"] is True
