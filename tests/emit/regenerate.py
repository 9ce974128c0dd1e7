"""The committed output: `python tests/emit/regenerate.py` rewrites generated/ and docs/sass.md.

What a kernel carries of the device library stands there once, in two files that the kernels include.
"""

from pathlib import Path

from attngen.arch import ARCHS
from attngen.emit import emit_module
from attngen.emit.device import FUNCTIONS, INSTRUCTIONS, paragraphs
from attngen.lower import lower
from attngen.resources import shipped_specs
from attngen.spec import load
from tests.emit.sass import write_table

FOLDER = Path(__file__).resolve().parents[2] / "generated"
LIBRARY = {"instructions.cuh": paragraphs(INSTRUCTIONS), "functions.cuh": paragraphs(FUNCTIONS)}


def expected_files() -> dict[str, str]:
    """File name -> text, for every shipped spec that names a GPU target."""
    files = {name: "\n\n".join(parts) + "\n" for name, parts in LIBRARY.items()}
    for path in shipped_specs():
        spec = load(path)
        arch = ARCHS[spec.target]
        if arch.emits:
            call = lower(spec, arch)
            files[f"{spec.name}.json"] = call.manifest.to_json()
            suffixes = {plan.module: f"_k{plan.up_to}" for plan in call.programs if plan.up_to}
            for name, kernels in call.modules.items():
                suffix = suffixes.get(name, name.removeprefix(call.attention.module))
                files[f"{spec.name}{suffix}.cu"] = including_library(emit_module(kernels))
    return files


def including_library(text: str) -> str:
    """An emitted text with includes in the place of what it carries of the library."""
    kept: list[str] = []
    for paragraph in text.split("\n\n"):
        file = next((name for name, parts in LIBRARY.items() if paragraph in parts), None)
        part = paragraph if file is None else f'#include "{file}"'
        if part not in kept[-1:]:
            kept.append(part)
    return "\n\n".join(kept)


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
