"""What the pages say of the expression language is so, what they show runs, and the files they name exist."""

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import attngen
from attngen.expr.arithmetic import FUNCTIONS
from attngen.expr.scope import prelude

ROOT = Path(attngen.__file__).parents[1]
PAGES = {
    page: (ROOT / page).read_text(encoding="utf-8")
    for page in (
        "docs/language.md", "docs/fp8.md", "docs/lengths.md", "docs/serving.md", "docs/integration.md", "README.md",
    )
}  # fmt: skip
PYTHON = {
    page: [
        (f"{page}, line {content.count(chr(10), 0, found.start()) + 2}", found[1])
        for found in re.finditer(r"```python\n(.*?)```", content, re.DOTALL)
        if "randn" in found[1] or "randint" in found[1]  # the others go on with tensors of the reader's
    ]
    for page, content in PAGES.items()
}
"""The blocks of each page that make tensors of their own, with where they begin."""
RUN_EACH = """
import json, sys
for place, text in json.load(sys.stdin):
    exec(compile(text, place, "exec"), {"__name__": "__main__"})
"""
NAMING = sorted(
    [ROOT / "README.md", ROOT / "tests/README.md", *(ROOT / "docs").rglob("*.md")],
    key=lambda page: page.as_posix(),
)
"""The pages that name files of the tree."""
MAP = [page for page in NAMING if page.parent.name == "design" or page.name == "design.md"]
FOLDERS = (".ci", "attngen", "benchmarks", "docs", "examples", "generated", "specs", "templates", "tests")
SUFFIXES = "attn|cu|cuh|hpp|j2|json|lark|md|py|sh|yaml"


def names_of_files(page: Path) -> set[str]:
    """The files that a page names in backticks; a name in capitals, as NAME_quantize.cu, stands for many."""
    texts = re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))
    named = rf"(?<![\w./-])[\w./-]*\w\.(?:{SUFFIXES})(?![\w-]|\.\w)"
    found = {name for text in texts for name in re.findall(named, text)}
    return {name for name in found if not re.match(r"[A-Z]+_", Path(name).name)}


@cache
def files_of_the_tree() -> set[str]:
    """The files of the tree, by their paths from its root."""
    found = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in (*found, *ROOT.glob("*.*"))}


@pytest.mark.parametrize("page", NAMING, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_a_page_names_exist(page: Path) -> None:
    """A path leads to a file from the root or from a folder on the way; a bare name is some file's."""
    tree = files_of_the_tree()
    wrong = [
        name
        for name in sorted(names_of_files(page))
        if not any(path == name or path.endswith(f"/{name}") for path in tree)
    ]
    assert wrong == []


def test_links_between_pages_lead_somewhere() -> None:
    """A link from page to page is relative, and so is right on a disk too."""
    wrong = [
        (page.name, target)
        for page in NAMING
        for target in re.findall(r"\]\(([^):#]+\.md)\)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).is_file()
    ]
    assert wrong == []


def test_the_map_has_every_module() -> None:
    """Each module of the package stands in docs/design.md or in the page of its subsystem."""
    named = {Path(name).name for page in MAP for name in names_of_files(page)}
    modules = {path.name for path in Path(attngen.__file__).parent.rglob("*.py")}
    missing = {name for name in modules if not name.startswith("__")} - named
    assert missing == set()


def test_the_glossary_is_a_page() -> None:
    """It has at most 44 lines, and no word twice."""
    lines = (ROOT / "docs/glossary.md").read_text(encoding="utf-8").splitlines()
    words = [
        word.strip() for line in lines if line.startswith("| ") for word in line.split("|")[1].split(",")
    ]
    assert len(lines) <= 44
    assert len(words) == len(set(words))


def test_every_name_is_in_the_reference() -> None:
    """Functions and definitions of the prelude stand in docs/language.md, those with parameters with theirs."""
    for name in FUNCTIONS:
        assert re.search(rf"`{name}[(`]", PAGES["docs/language.md"]), name
    for each in prelude().values():
        defaults = [f" = {default}" for default in each.defaults]
        defaults = [""] * (len(each.parameters) - len(defaults)) + defaults
        parameters = [name + default for name, default in zip(each.parameters, defaults, strict=True)]
        signature = f"{each.name}({', '.join(parameters)})" if parameters else each.name
        assert f"`{signature}`" in PAGES["docs/language.md"], signature


@pytest.mark.parametrize("page", [page for page in PAGES if "```yaml" in PAGES[page]])
def test_specs_of_the_pages_are_legal(page: str) -> None:
    """Every block of YAML is a spec that loads."""
    for text in re.findall(r"```yaml\n(.*?)```", PAGES[page], re.DOTALL):
        attngen.load(text)


@pytest.mark.parametrize("page", [page for page, blocks in PYTHON.items() if blocks])
def test_python_of_the_pages_runs(page: str, tmp_path: Path) -> None:
    """Every block that makes its own tensors runs on a machine without a GPU; those of a page share no names."""
    blocks, environment = json.dumps(PYTHON[page]), {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RUN_EACH]
    subprocess.run(command, input=blocks, text=True, check=True, cwd=tmp_path, env=environment)


def test_every_gpu_test_is_of_one_area() -> None:
    """The script that runs them on a machine with a GPU names each file once, and no other."""
    script = (ROOT / "benchmarks/gpu_check.sh").read_text(encoding="utf-8")
    named = [name for line in re.findall(r"on_gpu (.*\.py)", script) for name in line.split()]
    named += re.findall(r"tests/gpu/test_(\w+\.py)", script)
    assert sorted(named) == sorted(path.name[5:] for path in (ROOT / "tests/gpu").glob("test_*.py"))
