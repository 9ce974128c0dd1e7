"""Rules refuse before any compiler runs, and name what would do."""

import json
import re
from itertools import combinations, product
from typing import Any

import pytest
from refused import SPECIALISED, diagnostics, faults, only

import attngen
from attngen.arch import ARCHS
from attngen.errors import Diagnostic
from attngen.lower import lower
from attngen.spec import Spec
from tests.plans import kernel_plan


@pytest.mark.parametrize(
    ("schedule", "block_m", "nearest"),
    [
        ({"kind": "fa2", "warps": 4}, 128, "176"),
        ({"kind": "warp_specialized"}, 192, "144"),
        ({"kind": "pingpong"}, 192, "144"),
    ],
)
def test_block_n_200_is_no_multiple_of_the_k_step(
    schedule: dict[str, object], block_m: int, nearest: str
) -> None:
    """The nearest valid values pass every rule, not only the one that was broken."""
    tile = {"block_m": block_m, "block_n": 200}
    found = faults(tile=tile, problem={"head_dim": 32}, schedule={**schedule, "stages": 1})
    assert found["mma-k-step"] == found["registers"] == (nearest,)


@pytest.mark.parametrize("kind", SPECIALISED)
def test_the_nearest_values_pass_with_any_tile_that_auto_may_take(kind: str) -> None:
    """Two warpgroups have the registers for 192 and 208 keys of head_dim 32, though auto would start with three."""
    changes: dict[str, object] = {"problem": {"head_dim": 32}, "schedule": {"kind": kind, "stages": 1}}
    fault = only(tile={"block_n": 200}, **changes)
    assert (fault.rule, fault.nearest) == ("mma-k-step", ("192", "208"))
    for block_n in (192, 208):
        plan = kernel_plan(attngen.load(changes | {"tile": {"block_n": block_n}}), ARCHS["sm_90a"])
        assert (plan.block_n, plan.worker.warpgroups) == (block_n, 2)


@pytest.mark.parametrize(("head_dim", "nearest"), [(64, "192"), (128, "192"), (256, "128")])
@pytest.mark.parametrize("kind", ("auto", *SPECIALISED))
def test_too_many_rows_are_told_of_block_m(kind: str, head_dim: int, nearest: str) -> None:
    """A spec that says block_m alone reads nothing of the warpgroups that follow from it, nor of what those cost."""
    fault = only(problem={"head_dim": head_dim}, tile={"block_m": 256}, schedule={"kind": kind})
    assert fault.message == "tile.block_m = 256 must be at most 192"
    assert (fault.rule, fault.path, fault.value) == ("warpgroups", "tile.block_m", 256)
    assert fault.note.startswith("each consumer warpgroup owns 64 rows") and fault.nearest == (nearest,)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("arch", "rule", "nearest"),
    [("sm_90a", "wgmma-rows", ("64", "128")), ("sm_80", "mma-rows", ("96", "112"))],
)
def test_rows_without_owner_have_no_cost(
    arch: str, rule: str, nearest: tuple[str, ...], head_dim: int
) -> None:
    """block_m 100 breaks one rule: the registers of such a tile are no second fault."""
    fault = only(arch, problem={"head_dim": head_dim}, tile={"block_m": 100})
    assert (fault.rule, fault.path, fault.nearest) == (rule, "tile.block_m", nearest)


def test_the_cost_is_told_where_no_other_rows_would_do() -> None:
    """Beside block_m 100, 512 keys fit no tile: then both faults are told, each by its own value."""
    found = diagnostics(problem={"head_dim": 64}, tile={"block_m": 100, "block_n": 512})
    assert {fault.rule: fault.path for fault in found} == {
        "wgmma-rows": "tile.block_m",
        **dict.fromkeys(("wgmma-columns", "registers"), "tile.block_n"),
    }
    assert all(not fault.nearest for fault in found)


@pytest.mark.parametrize(
    ("arch", "changes", "rule", "path", "nearest"),
    [
        (
            "sm_90a",
            {"tile": {"block_n": 128}, "schedule": {"stages": 8}},
            "shared-memory",
            "tile.block_n",
            ("48",),
        ),
        (
            "sm_86",
            {"problem": {"head_dim": 256}, "schedule": {"stages": 6}},
            "shared-memory",
            "schedule.stages",
            ("5",),
        ),
        (
            "sm_90a",
            {"problem": {"head_dim": 256}, "schedule": {"warpgroups": 3}},
            "registers",
            "schedule.warpgroups",
            ("2",),
        ),
        (
            "sm_80",
            {"tile": {"block_m": 128}, "schedule": {"kind": "fa2", "warps": 3}},
            "mma-rows",
            "tile.block_m",
            ("96",),
        ),
        (
            "sm_90a",
            {
                "problem": {"head_dim": 256},
                "tile": {"block_m": 128},
                "schedule": {"kind": "pingpong", "warpgroups": 3},
            },
            "wgmma-rows",
            "schedule.warpgroups",
            ("2",),
        ),
        (
            "simulator",
            {"tile": {"block_m": 64}, "schedule": {"kind": "pingpong", "warpgroups": 3}},
            "wgmma-rows",
            "tile.block_m",
            ("63", "66"),
        ),
    ],
    ids=str,
)
def test_a_fault_is_told_of_a_value_that_the_spec_gives(
    arch: str, changes: dict[str, dict[str, Any]], rule: str, path: str, nearest: tuple[str, ...]
) -> None:
    """Of the values that make a rule break, those left to auto are never blamed; what is named would do."""
    fault = only(arch, **changes)
    assert (fault.rule, fault.path, fault.nearest) == (rule, path, nearest)
    section, field = path.split(".")
    assert fault.value == changes[section][field] and fault.message.startswith(f"{path} = {fault.value} ")
    assert_nearest_are_legal(arch, changes)


KNOBS_THAT_BREAK: list[dict[str, dict[str, Any]]] = [
    {"tile": {"block_n": 200}},
    {"tile": {"block_n": 512}, "schedule": {"stages": 1}},
    {"tile": {"block_m": 100}},
    {"tile": {"block_m": 24}},
    {"schedule": {"stages": 9}},
]
WARPGROUP_KNOBS_THAT_BREAK: list[dict[str, dict[str, Any]]] = [
    {"schedule": {"warpgroups": 4}},
    {"schedule": {"warpgroups": 9}},
    {"tile": {"block_m": 192}, "schedule": {"warpgroups": 2}},
]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *((kind, changes) for kind in ("auto", "fa2", *SPECIALISED) for changes in KNOBS_THAT_BREAK),
        *((kind, changes) for kind in SPECIALISED for changes in WARPGROUP_KNOBS_THAT_BREAK),
    ],
    ids=str,
)
def test_the_nearest_values_are_legal(kind: str, changes: dict[str, dict[str, Any]]) -> None:
    """Lowering with any value that an error names succeeds."""
    changes = changes | {"schedule": {"kind": kind} | changes.get("schedule", {})}
    assert any(fault.nearest for fault in diagnostics(**changes))
    assert_nearest_are_legal("sm_90a", changes)


def assert_nearest_are_legal(arch: str, changes: dict[str, dict[str, Any]]) -> None:
    for fault in diagnostics(arch, **changes):
        for value in fault.nearest:
            spec = attngen.load({"problem": {"head_dim": 128}} | changes)
            kernel_plan(spec.replace({fault.path: int(value)}), ARCHS[arch])


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("sm_90a", {"tile": {"block_m": 256}}),
        ("sm_90a", {"tile": {"block_m": 128}, "schedule": {"warpgroups": 3}}),
        ("simulator", {"tile": {"block_m": 5}, "schedule": {"kind": "pingpong", "warpgroups": 2}}),
    ],
    ids=str,
)
def test_nearest_values_keep_what_the_spec_says(arch: str, changes: dict[str, dict[str, Any]]) -> None:
    """Of block_m and warpgroups one follows from the other only where the spec leaves it open."""
    assert_nearest_are_legal(arch, changes)


def test_a_tile_too_large_for_shared_memory() -> None:
    """sm_86 has 99 KB; the report gives the sum that exceeds it."""
    with pytest.raises(attngen.PlanError, match=r"= 131072 bytes") as caught:
        kernel_plan(
            attngen.load(
                {
                    "problem": {"head_dim": 256},
                    "tile": {"block_m": 64, "block_n": 64},
                    "schedule": {"stages": 1},
                }
            ).replace({"tile.block_n": 96}),
            ARCHS["sm_86"],
        )
    assert any(fault.rule == "shared-memory" for fault in caught.value.diagnostics)


@pytest.mark.parametrize("kind", SPECIALISED)
@pytest.mark.parametrize("arch", [name for name, arch in ARCHS.items() if not arch.wgmma])
def test_a_schedule_of_warpgroups_names_the_targets_that_have_it(arch: str, kind: str) -> None:
    """Without wgmma it is refused where it is written, never replaced in silence; what runs there is named."""
    fault = only(arch, schedule={"kind": kind})
    assert fault.message == f"schedule.kind = {kind} is not to be had on {arch}"
    assert (fault.rule, fault.path, fault.value) == ("schedule-target", "schedule.kind", kind)
    assert "sm_90a" in fault.note and "simulator" in fault.note
    assert fault.nearest == ("serial", "fa2")
    for nearest in fault.nearest:
        spec = attngen.load({"problem": {"head_dim": 128}, "schedule": {"kind": nearest}})
        assert kernel_plan(spec, ARCHS[arch]).schedule == nearest


def test_auto_is_the_fastest_schedule_of_the_target() -> None:
    """warp_specialized on Hopper, fa2 elsewhere."""
    spec = attngen.load({"problem": {"head_dim": 128}})
    chosen = {name: kernel_plan(spec, arch).schedule for name, arch in ARCHS.items()}
    assert chosen == dict.fromkeys(ARCHS, "fa2") | {"sm_90a": "warp_specialized"}


@pytest.mark.parametrize(
    ("kind", "field", "value", "belongs"),
    [
        ("fa2", "overlap", True, "warp_specialized and pingpong"),
        ("fa2", "overlap", False, "warp_specialized and pingpong"),
        ("fa2", "warpgroups", 2, "warp_specialized and pingpong"),
        ("serial", "persistent", True, "warp_specialized and pingpong"),
        ("pingpong", "warps", 4, "serial and fa2"),
        ("warp_specialized", "warps", 8, "serial and fa2"),
        ("auto", "warps", 4, "serial and fa2"),
    ],
)
def test_a_field_of_another_schedule_is_refused(kind: str, field: str, value: object, belongs: str) -> None:
    """It is not ignored in silence: the schedules it is for are named, and leaving it to auto passes."""
    fault = only(schedule={"kind": kind, field: value})
    assert (fault.rule, fault.path, fault.value) == ("schedule-field", f"schedule.{field}", value)
    assert fault.message.startswith(
        f"schedule.{field} = {json.dumps(value)} means nothing to "
    )  # as YAML has it
    assert fault.note == f"it is for {belongs}"
    assert fault.nearest == ("auto",)
    kernel_plan(
        attngen.load({"problem": {"head_dim": 128}, "schedule": {"kind": kind, field: "auto"}}),
        ARCHS["sm_90a"],
    )


def test_every_field_of_another_schedule_is_told() -> None:
    """Three fields that mean nothing to serial are three faults, each at its own place in the text."""
    text = "problem: {head_dim: 64}\nschedule:\n  kind: serial\n  overlap: true\n  warpgroups: 2\n  persistent: false\n"
    with pytest.raises(attngen.PlanError) as caught:
        kernel_plan(attngen.load(text), ARCHS["sm_90a"])
    places = {fault.path: fault.location.line for fault in caught.value.diagnostics if fault.location}
    assert places == {"schedule.overlap": 4, "schedule.warpgroups": 5, "schedule.persistent": 6}


@pytest.mark.parametrize("kind", SPECIALISED)
def test_a_fourth_warpgroup_is_refused(kind: str) -> None:
    """Four consumers leave too few registers; three are the nearest at head_dim 64."""
    fault = only(problem={"head_dim": 64}, schedule={"kind": kind, "warpgroups": 4})
    assert fault.message == "schedule.warpgroups = 4 must be at most 3"
    assert (fault.rule, fault.value, fault.nearest) == ("warpgroups", 4, ("3",))
    fault = only("simulator", tile={"block_m": 8}, schedule={"kind": kind, "warpgroups": 4})
    assert (fault.rule, fault.nearest) == ("warpgroups", ("2",))  # 8 rows are not 3 times a number


def test_a_warpgroup_owns_the_rows_of_one_wgmma() -> None:
    """block_m is 64 rows a consumer; on the simulator the warpgroups only share the rows."""
    two: dict[str, object] = {"kind": "pingpong", "warpgroups": 2}
    found = {fault.rule: fault for fault in diagnostics(tile={"block_m": 192}, schedule=two)}
    fault = found["wgmma-rows"]
    assert fault.message == "tile.block_m = 192 must be 64 for each consumer warpgroup"
    assert fault.note == "128 for 2: each owns the rows of one wgmma" and fault.nearest == ("128",)
    fault = only(tile={"block_m": 32})
    assert (fault.rule, fault.nearest) == ("wgmma-rows", ("64",))
    found = {fault.rule: fault for fault in diagnostics(tile={"block_m": 100})}
    fault = found["wgmma-rows"]  # where the spec leaves the warpgroups open, one and two of them are right
    assert fault.message == "tile.block_m = 100 must be 64 for each consumer warpgroup"
    assert fault.nearest == ("64", "128")
    fault = only("simulator", tile={"block_m": 5}, schedule=two)
    assert (fault.rule, fault.message) == ("wgmma-rows", "tile.block_m = 5 must be a multiple of 2")
    for block_m in (64, 128):
        plan = kernel_plan(
            attngen.load({"problem": {"head_dim": 128}, "tile": {"block_m": block_m}}), ARCHS["sm_90a"]
        )
        assert (plan.block_m, plan.worker.warpgroups) == (block_m, block_m // 64)


def test_s_of_a_block_is_one_wgmma_wide() -> None:
    """272 keys are beyond the widest wgmma, 256; that passes every rule with one warpgroup of head_dim 32."""
    changes: dict[str, object] = {
        "problem": {"head_dim": 32},
        "tile": {"block_m": 64, "block_n": 272},
        "schedule": {"stages": 2},
    }
    found = {fault.rule: fault for fault in diagnostics(**changes)}
    assert set(found) == {"wgmma-columns", "registers"}
    assert found["wgmma-columns"].message == "tile.block_n = 272 must be at most 256"
    assert found["wgmma-columns"].nearest == ("256",)
    widest = kernel_plan(attngen.load(changes | {"tile": {"block_m": 64, "block_n": 256}}), ARCHS["sm_90a"])
    assert widest.block_n == 256
    on_simulator = attngen.load(changes | {"schedule": {"kind": "pingpong"}})
    assert kernel_plan(on_simulator, ARCHS["simulator"]).block_n == 272


def sum_told(fault: Diagnostic) -> tuple[dict[str, int], int]:
    """The parts of a sum like `acc_s 136 + p 68 = 204 bytes`, and its total."""
    left, right = fault.note.split(" = ")
    parts = (re.fullmatch(r"(\w+) (\d+)", part) for part in left.split(" + "))
    return {part[1]: int(part[2]) for part in parts if part}, int(right.split()[0])


@pytest.mark.parametrize(
    ("schedule", "parts", "free", "nearest"),
    [
        ({"kind": "fa2", "warps": 4}, {"acc_s": 256, "acc_o": 128}, 208, ("80",)),
        ({"kind": "warp_specialized"}, {"acc_s": 128, "p": 64, "acc_o": 64}, 216, ("192",)),
        ({"kind": "pingpong"}, {"acc_s": 128, "p": 64, "acc_o": 64}, 216, ("192",)),
    ],
)
def test_a_tile_too_large_for_the_registers(
    schedule: dict[str, object], parts: dict[str, int], free: int, nearest: tuple[str, ...]
) -> None:
    """256 keys of head_dim 128: the report counts each tile, P too where it outlives S, and what is free."""
    tile = {"block_m": 128, "block_n": 256}
    found = {fault.rule: fault for fault in diagnostics(tile=tile, schedule={**schedule, "stages": 1})}
    fault = found["registers"]
    assert sum_told(fault) == (parts, sum(parts.values()))
    asked = f"asks for {sum(parts.values())} registers a thread in tiles and {free} are free"
    assert fault.message == f"tile.block_n = 256 {asked}" and fault.nearest == nearest


@pytest.mark.parametrize("kind", SPECIALISED)
def test_rings_too_large_for_shared_memory(kind: str) -> None:
    """96 keys of head_dim 256: the report names the buffers, what they need, what there is, and 80."""
    tile, schedule = {"block_m": 128, "block_n": 96}, {"kind": kind, "stages": 2}
    fault = only(problem={"head_dim": 256}, tile=tile, schedule=schedule)
    assert (fault.rule, fault.nearest) == ("shared-memory", ("80",))
    parts, total = sum_told(fault)
    assert parts.items() >= {"q": 65536, "k": 98304, "v": 98304}.items() and "out" not in parts
    assert f"asks for {total} bytes of shared memory and sm_90a has 232448" in fault.message
    assert total == 65536 + 2 * 98304 + 2 * 8 * (1 + 2 + 2)  # mbarriers, where no next tile is drawn


@pytest.mark.parametrize("kind", SPECIALISED)
def test_only_a_persistent_block_has_room_for_its_next_tile(kind: str) -> None:
    """Shared memory ends with the mbarriers, and with 16 bytes for the number of the next tile where one is drawn."""
    for persistent in (False, True):
        schedule = {"kind": kind, "persistent": persistent}
        kernel = kernel_plan(
            attngen.load({"problem": {"head_dim": 64}, "schedule": schedule}), ARCHS["sm_90a"]
        )
        assert kernel.smem_bytes - kernel.tile_slot_offset == 16 * persistent


def test_the_sum_of_shared_memory_adds_up() -> None:
    """The parts that are told sum to the total that is told."""
    tile = {"block_m": 128, "block_n": 96}
    parts, total = sum_told(only(problem={"head_dim": 256}, tile=tile, schedule={"stages": 2}))
    assert sum(parts.values()) == total


def test_serial_has_one_stage() -> None:
    """Serial overlaps nothing, so more stages are refused."""
    assert faults(schedule={"kind": "serial", "stages": 2})["serial-stages"] == ("1",)


def test_a_tile_of_a_gpu_has_512_rows_at_most() -> None:
    """Indices past the end of the longest sequence fit 32 bits for no larger one; the simulator has any."""
    changes: dict[str, object] = {
        "problem": {"head_dim": 32},
        "tile": {"block_m": 1024, "block_n": 16},
        "schedule": {"kind": "fa2", "warps": 8, "stages": 1},
    }
    fault = only("sm_80", **changes)
    assert (fault.rule, fault.message) == ("largest-tile", "tile.block_m = 1024 must be at most 512")
    assert fault.nearest == ("512",)
    kernel_plan(attngen.load(changes).replace({"tile.block_m": 512}), ARCHS["sm_80"])
    assert only("sm_80", **changes | {"tile": {"block_m": 500, "block_n": 16}}).nearest == ("384", "512")
    assert kernel_plan(attngen.load(changes), ARCHS["simulator"]).block_m == 1024


@pytest.mark.parametrize("head_dim", range(32, 257, 8))
@pytest.mark.parametrize("arch", [name for name, arch in ARCHS.items() if arch.emits])
def test_auto_finds_a_legal_tile_everywhere(arch: str, head_dim: int) -> None:
    """No head dim is without a kernel on any target, in any schedule that the target has."""
    for kind in ("serial", "fa2", *(SPECIALISED if ARCHS[arch].wgmma else ())):
        spec: Spec = attngen.load({"problem": {"head_dim": head_dim}, "schedule": {"kind": kind}})
        plan = kernel_plan(spec, ARCHS[arch])
        assert plan.smem_bytes <= ARCHS[arch].smem_bytes_per_block


@pytest.mark.parametrize("qk", range(32, 257, 8))
def test_no_buffer_runs_into_another(qk: int) -> None:
    """However wide V is: only a buffer that lies over another shares bytes, and with that one, of one stage."""
    for v, mask in product(range(32, 257, 8), ("full", "causal")):
        spec = attngen.load({"problem": {"head_dim": {"qk": qk, "v": v}}, "mask": mask})
        for plan in lower(spec, ARCHS["sm_90a"]).programs:
            for a, b in combinations(plan.buffers, 2):
                if a.offset < b.offset + b.size_bytes and b.offset < a.offset + a.size_bytes:
                    assert (b.overlays, a.stages) == (a.name, 1), plan.name


def test_what_no_tile_has_registers_for_is_refused() -> None:
    """Keys' scales, lookups for every pair and promotion beside 256 columns of O; with less of it there is a tile."""
    lookups = {
        "tensors": {
            "allow": "bool[num_heads_q, seqlen_q, seqlen_k]",
            "bias": "bf16[num_heads_q, seqlen_q, seqlen_k]",
        },
        "mask": "allow[h, q_idx, kv_idx]",
        "score": "score + bias[h, q_idx, kv_idx]",
    }
    wanted = {
        "problem": {"head_dim": 256},
        "precision": {"inputs": "e4m3", "scales": "per_token", "promote": 1},
    }
    fault = only(**wanted, **lookups)
    assert fault.rule == "registers" and "part_o is what precision.promote: 0 does without" in fault.note
    kernel_plan(attngen.load(wanted), ARCHS["sm_90a"])
    kernel_plan(
        attngen.load(wanted | {"precision": wanted["precision"] | {"promote": 0}} | lookups), ARCHS["sm_90a"]
    )
