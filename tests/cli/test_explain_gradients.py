"""`attngen explain` of specs with gradients: facts of each kernel, programs, and timelines as pictures and as text."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from backward_drawing import PAGE, SHOWN, drawn
from click.testing import Result

import attngen as package
from attngen.cli.timeline_text import COLUMNS
from attngen.plan import listing
from attngen.simulate import UNITS, count

Attngen = Callable[..., Result]

TRAINED = (
    "name: trained\ntarget: sm_90a\nproblem: {head_dim: 32}\nmask: causal\ngradients: [q, k, v]\n"
    "check:\n  - {batch: 2, heads: 4, heads_kv: 2, seqlen_q: 130, seqlen_k: 200}\n"
)


@pytest.fixture
def trained(tmp_path: Path) -> str:
    """A spec with gradients."""
    path = tmp_path / "trained.yaml"
    path.write_text(TRAINED)
    return str(path)


def facts_of(result: Result) -> dict[str, str]:
    """The lines of a table of one spec, by their names."""
    assert result.exit_code == 0, result.output
    found = (re.match(r" (\S.*?)(?: {2,}(\S.*?))? *$", line) for line in result.stdout.splitlines())
    return {match[1]: match[2] or "" for match in found if match}


@pytest.mark.usefixtures("wide_lines")
def test_each_kernel_of_a_pass_has_its_facts(attngen: Attngen, trained: str) -> None:
    """Tiles, memory, registers, spills, FLOPs and bytes, as the plans and ptxas have them, and sums over the pass."""
    found = facts_of(attngen("explain", trained))
    assert found["gradients"] == "of q, k, v, by prepare_rows, query_gradients, key_gradients"
    kernel = package.compile(trained)
    flops = 0
    for plan in kernel.call.gradients:
        counted = count(plan, 130, 200, 2, 4, 2)
        (used,) = kernel.modules[plan.module].compiled.resources
        told = {
            name.partition(": ")[2]: text for name, text in found.items() if name.startswith(plan.schedule)
        }
        assert told["tile"] == f"{plan.block_m} queries x {plan.block_n} keys, {plan.stages} stages"
        assert told["shared memory"] == f"{plan.smem_bytes / 1024:.0f} KiB"
        assert told["registers"].startswith(f"{used.registers} a thread")
        assert told["spills"] == "0 + 0" and " block" in told["occupancy"]
        assert told["FLOPs"] == f"{counted.flops:.4g}" and "(reads " in told["bytes"]
        flops += counted.flops
    assert found["backward: FLOPs"] == f"{flops:.4g}"
    rows, padded = 2 * 4 * 130, 2 * 4 * 256
    read, written = rows * (2 * 32 * 2 + 4), padded * 2 * 4
    assert found["prepare_rows: bytes"].startswith(f"{(read + written) / 1024:.3g} KiB (reads out ")


@pytest.mark.usefixtures("wide_lines")
def test_one_kernel_of_all_gradients_has_its_facts(attngen: Attngen) -> None:
    """What it is, in which order it adds, and its line and panel in a timeline."""
    Path("fused.yaml").write_text(TRAINED.replace("head_dim: 32", "head_dim: 64"))
    found = facts_of(attngen("explain", "fused.yaml"))
    assert found["gradients"] == "of q, k, v, by prepare_rows, fused_gradients, finish_sums"
    assert "add to dQ in one order" in found["order of sums"]
    result = attngen("explain", "fused.yaml", "--timeline", "fused.txt", "--seqlen", "512")
    told = [line for line in result.output.splitlines() if "predicted" in line]
    heads = ("trained: ", "trained, fused_gradients: ", "trained: backward, ")
    assert [line.startswith(head) for line, head in zip(told, heads, strict=True)] == [True] * 3
    assert "fused_gradients" in Path("fused.txt").read_text()


def test_a_spec_without_gradients_says_how_to_have_them(attngen: Attngen, small: str) -> None:
    """One line, which names the key; nothing of a backward pass stands there."""
    found = facts_of(attngen("explain", small))
    assert found["gradients"] == "none: gradients: [q, k, v] adds a backward pass"
    assert not any("gradients:" in name or name.startswith("backward") for name in found)


@pytest.mark.usefixtures("wide_lines")
def test_a_mask_that_is_walked_has_its_tables_in_the_pass(attngen: Attngen) -> None:
    """Tables are filled for the tiles of each kernel of the pass, which is told of each."""
    Path("doc.yaml").write_text(
        TRAINED.replace(
            "mask: causal", "tensors: {doc: 'i32[batch, seqlen_k]'}\nmask: causal and document(doc)"
        )
    )
    found = facts_of(attngen("explain", "doc.yaml"))
    for name in ("query_gradients", "key_gradients"):
        assert f"fill_tables of {name}" in found["gradients"]
        assert f"fill_tables of {name}: registers" in found
        assert "reads tensor.doc " in found[f"fill_tables of {name}: bytes"]


@pytest.mark.usefixtures("wide_lines")
def test_a_mask_on_a_sorted_tensor_has_its_boundaries_in_the_pass(attngen: Attngen) -> None:
    """The mask is a range of keys by boundaries, which are named; each side of the pass has a kernel for its own."""
    Path("doc.yaml").write_text(
        TRAINED.replace(
            "mask: causal", "tensors: {doc: 'i32[batch, seqlen_k] sorted'}\nmask: causal and document(doc)"
        )
    )
    result = attngen("explain", "doc.yaml")
    found = facts_of(result)
    assert found["blocks of keys"].startswith("from bounds in closed form")
    assert "keys.boundary0: the first key for which doc[b, kv_idx] >= doc[b, " in result.stdout
    assert "fill_tables" not in found["gradients"]
    for axis in ("keys", "rows"):
        assert f"find_boundaries among {axis}" in found["gradients"]
        assert "reads tensor.doc " in found[f"find_boundaries among {axis}: bytes"]


def test_explain_program_prints_both_passes(attngen: Attngen, trained: str) -> None:
    """Every Step of each kernel's roles, under the kernel's name."""
    result = attngen("explain", trained, "--program")
    call = package.compile(trained).call
    position = 0
    for plan in (call.attention, *call.gradients):
        for role in plan.roles:
            position = result.stdout.index(f"{plan.name}, role {role.name}", position)
            assert listing(role.program, indent=1) in result.stdout[position:]


@pytest.mark.parametrize("suffix", ["svg", "txt"])
def test_a_timeline_has_every_kernel(attngen: Attngen, trained: str, suffix: str) -> None:
    """Each kernel has a panel and a line of figures, and the pass one more; the same bytes come out again."""
    for name in ("a", "b"):
        result = attngen("explain", trained, "--timeline", f"{name}.{suffix}", "--seqlen", "512")
        assert result.exit_code == 0, result.output
    told = [line for line in result.output.splitlines() if "predicted" in line]
    heads = ("trained: ", "trained, query_gradients: ", "trained, key_gradients: ", "trained: backward, ")
    assert len(told) == 4 and all(line.startswith(head) for line, head in zip(told, heads, strict=True))
    assert "TFLOPS" in told[0] and "TFLOPS" not in told[1] and "TFLOPS" in told[3]
    text = Path(f"a.{suffix}").read_text()
    assert text == Path(f"b.{suffix}").read_text()
    assert "query_gradients" in text and "key_gradients" in text


def test_the_text_has_a_lane_for_each_unit_and_role(attngen: Attngen, trained: str) -> None:
    """Lines of one panel are equally long; the GEMMs of a pair come in order in the warps' line."""
    kind = ("--set", "schedule.kind=fa2")
    assert attngen("explain", trained, *kind, "--timeline", "out.txt", "--seqlen", "64").exit_code == 0
    *panels, legend = Path("out.txt").read_text().split("\n\n")
    assert len(panels) == 3 and legend.startswith("a letter is a GEMM")
    for panel, gemms in zip(panels, ("S+O+", "S+P+Q+", "S+P+V+K+"), strict=True):
        title, *lanes = panel.splitlines()
        assert title.startswith("trained") and "cycles on an H200, a column is" in title
        assert [line.partition("  ")[0].rstrip() for line in lanes[:4]] == list(UNITS)
        drawn = [line.partition(" |")[2].removesuffix("|") for line in lanes]
        assert len({len(each) for each in drawn}) == 1 and len(drawn[0]) <= COLUMNS
        busy, copied = drawn[UNITS.index("tensor core")], drawn[0]
        assert copied.index("#") < re.search("[A-Z]", busy).start()  # type: ignore[union-attr]
        if panel is not panels[0]:
            assert all(re.search(gemms, re.sub("[^A-Z]", "", each)) for each in drawn[4:])


def test_the_page_shows_what_the_tool_draws() -> None:
    """The drawing in docs/design/schedules.md is the file that the command above it writes, byte by byte."""
    (shown,) = SHOWN.findall(PAGE.read_text())
    assert shown == drawn(), "run python tests/cli/backward_drawing.py"
