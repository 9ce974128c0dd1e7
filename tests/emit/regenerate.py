"""The committed output: `python tests/emit/regenerate.py` rewrites generated/ and docs/sass.md."""

from pathlib import Path

from attngen.arch import ARCHS
from attngen.emit import emit_module
from attngen.lower import lower
from attngen.resources import shipped_specs
from attngen.spec import load
from tests.emit.sass import write_table

FOLDER = Path(__file__).resolve().parents[2] / "generated"


def expected_files() -> dict[str, str]:
    """File name -> text, for every shipped spec that names a GPU target."""
    files = {}
    for path in shipped_specs():
        spec = load(path)
        arch = ARCHS[spec.target]
        if arch.emits:
            call = lower(spec, arch)
            files[f"{spec.name}.json"] = call.manifest.to_json()
            suffixes = {plan.module: f"_k{plan.up_to}" for plan in call.programs if plan.up_to}
            for name, kernels in call.modules.items():
                suffix = suffixes.get(name, name.removeprefix(call.attention.module))
                files[f"{spec.name}{suffix}.cu"] = emit_module(kernels)
    return files


def main() -> None:
    """Rewrite the folder."""
    files = expected_files()
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.iterdir():
        old.unlink()
    for name, text in files.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    write_table()


if __name__ == "__main__":
    main()
