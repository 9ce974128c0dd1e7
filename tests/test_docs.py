"""What the pages say of the expression language is so, and what they show runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import attngen
from attngen.expr.arithmetic import FUNCTIONS
from attngen.expr.scope import prelude

ROOT = Path(attngen.__file__).parents[1]
PAGES = {
    page: (ROOT / page).read_text(encoding="utf-8")
    for page in ("docs/language.md", "docs/fp8.md", "README.md")
}
PYTHON = [
    pytest.param(text, id=f"{page}-{i}")
    for page, content in PAGES.items()
    for i, text in enumerate(re.findall(r"```python\n(.*?)```", content, re.DOTALL))
    if "randn" in text  # the others go on with tensors of the reader's
]


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


@pytest.mark.parametrize("page", PAGES)
def test_specs_of_the_pages_are_legal(page: str) -> None:
    """Every block of YAML is a spec that loads."""
    specs = re.findall(r"```yaml\n(.*?)```", PAGES[page], re.DOTALL)
    assert specs
    for text in specs:
        attngen.load(text)


@pytest.mark.parametrize("text", PYTHON)
def test_python_of_the_pages_runs(text: str, tmp_path: Path) -> None:
    """Every block that makes its own tensors runs on a machine without a GPU."""
    subprocess.run([sys.executable, "-c", text], check=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
