"""The drawing in docs/design/schedules.md: `python tests/cli/backward_drawing.py` has the tool draw it anew."""

import re
import shlex
from pathlib import Path
from tempfile import TemporaryDirectory

from click.testing import CliRunner

from attngen.cli import main

PAGE = Path(__file__).resolve().parents[2] / "docs/design/schedules.md"
SHOWN = re.compile(r"(?<=```text\n).*?(?=```)", re.DOTALL)


def drawn() -> str:
    """What the command on the page writes."""
    (command,) = re.findall(
        r"`attngen (explain .* --timeline backward\.txt)`", PAGE.read_text(encoding="utf-8")
    )
    with TemporaryDirectory() as folder:
        path = Path(folder, "backward.txt")
        result = CliRunner().invoke(main, shlex.split(command.replace(path.name, str(path))))
        assert result.exit_code == 0, result.output
        return path.read_text(encoding="utf-8")


if __name__ == "__main__":
    text = drawn()
    PAGE.write_text(SHOWN.sub(lambda _: text, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
