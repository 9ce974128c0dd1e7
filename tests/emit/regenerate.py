"""The committed output: `python tests/emit/regenerate.py` rewrites generated/ and docs/sass.md."""

from pathlib import Path

from attngen.arch import ARCHS
from attngen.emit.kernel import emit
from attngen.emit.manifest import manifest
from attngen.lower import lower
from attngen.quantization import Quantization
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
            plan = lower(spec, arch)
            for each in (plan, *plan.shorter):
                stem = spec.name + (f"_k{each.up_to}" if each.up_to else "")
                files[f"{stem}.cu"] = emit(each)
                files[f"{stem}.json"] = manifest(each).to_json()
            if plan.quantizer:
                quantization = Quantization(plan.quantizer)
                files[f"{spec.name}_quantize.cu"] = quantization.source
                files[f"{spec.name}_quantize.json"] = quantization.manifest
    return files


def main() -> None:
    """Rewrite the folder."""
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.iterdir():
        old.unlink()
    for name, text in expected_files().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    write_table()


if __name__ == "__main__":
    main()
