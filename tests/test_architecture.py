"""The house's directions: who may import whom, and what a bare machine can import."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import attngen
from attngen.resources import templates_dir

PACKAGE = Path(attngen.__file__).parent
ORDER = {
    "errors": 0, "memory": 0, "version": 0, "torch_state": 0, "dtypes": 1, "resources": 1, "quantize": 1,
    "scaling": 1, "arch": 2, "expr": 2, "spec": 3, "kernels_by_text": 4, "plan": 4, "bind": 5, "schedules": 5,
    "capture": 6, "lower": 6, "emit": 7, "simulate": 7, "check": 7, "runtime": 8, "autograd": 9, "compiled_module": 9,
    "serving": 9, "bound_call": 10, "built_call": 10, "transforms": 10, "few_queries": 11, "spec_call": 11,
    "kernel": 12, "api": 13,
    "fit_heads": 14, "fuzz": 14, "op": 14, "pair_tensors": 14, "varlen": 14, "flash_attn": 15, "hf": 16,
    "megatron_masks": 16, "sdpa": 16, "torchtitan": 16, "xformers": 16, "cli": 17, "megatron": 17, "__init__": 18,
    "__main__": 18,
}  # fmt: skip
BUDGET = {
    "attngen": 4250, "bind": 1880, "check": 3595, "cli": 4090, "emit": 1580, "expr": 6295, "flash_attn": 1490,
    "fuzz": 2445, "hf": 725, "lower": 3315,
    "plan": 6225, "runtime": 1795, "schedules": 3055, "sdpa": 1110, "simulate": 6820, "spec": 2415, "templates": 5470,
    "serving": 1355,
}  # fmt: skip
"""Lines of Python in each folder of the package, of the modules beside these, and of all templates.

A number is raised by the commit of the feature that needs the lines, and by no other; who makes do with less lowers it.
The package is to come to 23,000 lines in all without gradients, and to 26,000 with all that is to come.
"""
OWNERS = {
    "jinja2": {"emit"},
    "lark": {"expr"},
    "yaml": {"lower", "spec"},
    "cuda": {"runtime"},
    "hypothesis": {"fuzz"},
    "click": {"cli"},
    "rich": {"cli", "fuzz", "simulate"},
    "megatron": {"megatron"},
    "torchtitan": {"torchtitan"},
    "transformers": {"hf"},
}

FACTORIES = {
    f"{torch}.{name}"
    for torch in ("torch", "self._torch")
    for name in ("empty", "full", "linspace", "ones", "rand", "randn", "scalar_tensor", "tensor", "zeros")
}


def lines_by_folder() -> dict[str, int]:
    """Lines of Python by folder, "attngen" for the modules beside the folders, and of templates."""
    found: Counter[str] = Counter()
    for path in PACKAGE.rglob("*.py"):
        first, *rest = path.relative_to(PACKAGE).parts
        found[first if rest else "attngen"] += len(path.read_text(encoding="utf-8").splitlines())
    for path in templates_dir().rglob("*.*"):
        found["templates"] += len(path.read_text(encoding="utf-8").splitlines())
    return dict(sorted(found.items()))


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
    """No part imports one that stands above it, and emit, simulate and check never see each other."""
    wrong = []
    for part, module in imports():
        root, _, rest = module.partition(".")
        other = rest.partition(".")[0]
        if root == "attngen" and other and other != part and ORDER[other] >= ORDER[part]:
            wrong.append((part, module))
    assert wrong == []


def test_every_folder_keeps_to_its_budget() -> None:
    """No folder has more lines than its budget, and each has one."""
    found = lines_by_folder()
    table = "\n".join(
        f"{folder:10} {count:6} of {BUDGET.get(folder, 0):6}" for folder, count in found.items()
    )
    assert found.keys() == BUDGET.keys() and all(
        count <= BUDGET[folder] for folder, count in found.items()
    ), (
        f"lines and budgets:\n{table}\n"
        f"{'in all':10} {sum(found.values()):6} of {sum(BUDGET.values()):6}, the templates among them"
    )


def test_a_docstring_stands_on_its_own() -> None:
    """Whoever jumps to a definition has nothing above it that "the same" could mean."""
    files = [*PACKAGE.rglob("*.py"), *templates_dir().rglob("*.cuh"), *templates_dir().rglob("*.j2")]
    pronoun = re.compile(r'(?:"""|// )(?:The same|Likewise)\b')
    wrong = [str(path) for path in files if pronoun.search(path.read_text(encoding="utf-8"))]
    assert wrong == []


def test_no_two_modules_have_one_name() -> None:
    """A name in a traceback, or in a sentence, means one file."""
    names = Counter(path.name for path in PACKAGE.rglob("*.py") if not path.name.startswith("__"))
    assert [name for name, count in names.items() if count > 1] == []


def test_simulated_lengths_are_those_of_the_tile() -> None:
    """Beside what decodes tiles, or lays out what a call passes, the simulator never reads the call's own lengths."""
    found = {
        (path.name, function.name)
        for path in (PACKAGE / "simulate").rglob("*.py")
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute)
        and ast.unparse(node).endswith(("sizes.seqlen_q", "sizes.seqlen_k"))
    }
    assert found == {("device_memory.py", "by_heads"), ("visits.py", "declared_values")}


def test_each_library_has_one_owner() -> None:
    """jinja2, lark, yaml and the CUDA bindings are each imported in one part."""
    wrong = [
        (part, module)
        for part, module in imports()
        if part not in OWNERS.get(module.partition(".")[0], {part})
    ]
    assert wrong == []


def factories(tree: ast.AST) -> list[tuple[ast.Call, set[str | None]]]:
    """Calls of torch that make a tensor of a format that torch picks, and the keywords they pass."""
    return [
        (node, {keyword.arg for keyword in node.keywords})
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in FACTORIES
    ]


def test_no_tensor_leaves_its_format_to_torch() -> None:
    """What torch makes without a word on the format depends on the process's default dtype."""
    wrong = [
        f"{path.relative_to(PACKAGE)}:{call.lineno}"
        for path in PACKAGE.rglob("*.py")
        if path.parent.name != "fuzz" and path.name != "timing.py"  # whose tensors are no results
        for call, keywords in factories(ast.parse(path.read_text(encoding="utf-8")))
        if "dtype" not in keywords
    ]
    assert wrong == []


def test_tensors_made_on_import_say_their_device() -> None:
    """A default device may be set before attngen is imported."""
    wrong = [
        f"{path.relative_to(PACKAGE)}:{call.lineno}"
        for path in PACKAGE.rglob("*.py")
        for statement in ast.parse(path.read_text(encoding="utf-8")).body
        if not isinstance(statement, ast.FunctionDef | ast.ClassDef)
        for call, keywords in factories(statement)
        if "device" not in keywords
    ]
    assert wrong == []


def loaded_by(code: str) -> set[str]:
    """The libraries that a fresh Python loads for some lines, beyond what torch loads by itself."""
    program = (
        "import sys, torch; before = set(sys.modules)\n"
        f"{code}\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before}, file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return set(run.stderr.split())


def test_import_is_light() -> None:
    """`import attngen` loads neither the driver's bindings nor NVRTC's, nor what commands draw, print and read by, nor
    the libraries that it has faces for, nor torch's compiler, which takes seconds.
    """
    found = loaded_by("import attngen, attngen.hf; assert 'torch._dynamo' not in sys.modules")
    assert "attngen" in found
    assert found.isdisjoint(
        ("cuda", "click", "hypothesis", "matplotlib", "rich", "safetensors", "transformers")
    )


@pytest.mark.parametrize("arguments", [["--help"], ["check", "fa2_d64"], ["fuzz", "--help"]], ids=" ".join)
def test_commands_load_what_they_need(arguments: list[str]) -> None:
    """Neither plots nor Hypothesis are loaded for a command that has no use for them."""
    found = loaded_by(f"from attngen.cli import main; main({arguments}, standalone_mode=False)")
    assert {"attngen", "rich"} <= found
    assert found.isdisjoint(("hypothesis", "matplotlib", "safetensors"))
