"""The house's directions: who may import whom, and what a bare machine can import."""

import ast
import subprocess
import sys
from pathlib import Path

import attngen

PACKAGE = Path(attngen.__file__).parent
ORDER = {
    "errors": 0, "version": 0, "torch_state": 0, "dtypes": 1, "resources": 1, "quantize": 1, "scaling": 1,
    "arch": 2, "expr": 2, "spec": 3, "plan": 4, "schedules": 5, "lower": 6, "emit": 7, "simulate": 7,
    "reference": 7, "inputs": 7, "accuracy": 8, "declared_inputs": 8, "runtime": 8, "quantization": 9,
    "judging": 9, "api": 10, "bench": 10, "losses": 11, "fuzz": 11, "cli": 12, "__init__": 13, "__main__": 13,
}  # fmt: skip
OWNERS = {
    "jinja2": {"emit"},
    "lark": {"expr"},
    "yaml": {"spec"},
    "cuda": {"runtime"},
    "hypothesis": {"fuzz"},
    "click": {"cli", "fuzz"},
    "rich": {"cli", "fuzz", "simulate"},
}


def imports() -> list[tuple[str, str]]:
    """(part of the house, imported module) of every import statement."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found += [(part, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.append((part, node.module))
    return found


def test_imports_point_downwards() -> None:
    """No part imports one that stands above it, and emit, simulate and reference never see each other."""
    wrong = []
    for part, module in imports():
        root, _, rest = module.partition(".")
        other = rest.partition(".")[0]
        if root == "attngen" and other and other != part and ORDER[other] >= ORDER[part]:
            wrong.append((part, module))
    assert wrong == []


def test_each_library_has_one_owner() -> None:
    """jinja2, lark, yaml and the CUDA bindings are each imported in one part."""
    wrong = [
        (part, module)
        for part, module in imports()
        if part not in OWNERS.get(module.partition(".")[0], {part})
    ]
    assert wrong == []


def test_import_needs_no_driver() -> None:
    """`import attngen` loads neither the driver's bindings nor NVRTC's beyond what torch loads by itself."""
    code = (
        "import sys, torch; before = set(sys.modules); import attngen; "
        "new = {m for m in set(sys.modules) - before if m.split('.')[0] == 'cuda'}; assert not new, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
