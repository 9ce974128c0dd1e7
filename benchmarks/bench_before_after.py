"""Times this tree's kernels against those of other trees, all compiled here, in one process.

    python benchmarks/bench_before_after.py write DIR   # in another tree: the texts that it emits
    python benchmarks/bench_before_after.py time DIR... --out OUT

Specs are `auto`, so every table row of warpgroups that shipped masks and scores lead to is met; fa2 and serial are
there beside them. batch·seqlen = 16384, heads·head_dim = 2048. e4m3 kernels take operands made beforehand. All texts
run under this tree's manifest, so trees whose parameters differ cannot be compared so.
"""

import argparse
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import attngen
from attngen.arch import ARCHS
from attngen.check import timing
from attngen.check.inputs import random_inputs
from attngen.lower import lower
from attngen.plan import assemble

ARCH = ARCHS["sm_90a"]
LENGTHS = (512, 2048, 16384)
DOCUMENTS = 8
PLAIN: dict[str, dict[str, Any]] = {
    f"{inputs}_d{dim}_{mask}": {"problem": {"head_dim": dim}, "precision": {"inputs": inputs}, "mask": mask}
    for inputs, dims in (("bf16", (64, 96, 128, 256)), ("f16", (128,)), ("e4m3", (64, 128, 256)))
    for dim in dims
    for mask in ("full", "causal")
}
OLDER: dict[str, dict[str, Any]] = {
    f"{kind}_d{dim}_causal": {"problem": {"head_dim": dim}, "mask": "causal", "schedule": {"kind": kind}}
    for kind in ("fa2", "serial")
    for dim in (64, 128)
}
LANGUAGE: dict[str, dict[str, Any]] = {
    "window": {"mask": "window(1024, 0)"},
    "sinks": {"mask": "causal and (window(1024, 0) or sinks(4))"},
    "prefix": {"mask": "prefix(1024)"},
    "document": {"mask": "causal and document(doc)", "tensors": {"doc": "i32[batch, seqlen_k]"}},
    "alibi": {
        "mask": "causal",
        "score": "score + alibi(slopes)",
        "tensors": {"slopes": "f32[num_heads_q]"},
    },
    "bias": {
        "score": "score + bias[h, q_idx, kv_idx]",
        "tensors": {"bias": "bf16[num_heads_q, seqlen_q, seqlen_k]"},
    },
}
SPECS = PLAIN | OLDER | {name: {"problem": {"head_dim": 128}} | spec for name, spec in LANGUAGE.items()}


def kernels(only: str = "") -> Iterator[tuple[str, attngen.Kernel]]:
    """Every kernel of the specs that a pattern finds, under a name of its own, those of shorter sequences too."""
    for name, text in SPECS.items():
        if not re.search(only, name):
            continue
        spec = attngen.load(text | {"name": name, "target": ARCH.name})
        for plan in lower(spec, ARCH).programs:
            yield f"{name}_k{plan.up_to or 'any'}", attngen.Kernel(spec, assemble((plan,)))


def write(folder: Path) -> None:
    """Write the texts of this tree."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, kernel in kernels():
        (folder / f"{name}.cu").write_text(kernel.source, encoding="utf-8")


def declared(spec: attngen.Spec, shape: timing.Shape) -> dict[str, torch.Tensor]:
    """What a spec of the language reads."""
    values: dict[str, Callable[[], torch.Tensor]] = {
        "doc": lambda: (
            torch.arange(shape.seqlen_k, device="cuda", dtype=torch.int32) * DOCUMENTS // shape.seqlen_k
        ).expand(shape.batch, -1),
        "slopes": lambda: torch.exp2(-8.0 * torch.arange(1, shape.heads + 1, device="cuda") / shape.heads),
        "bias": lambda: torch.randn(
            shape.heads, shape.seqlen_q, shape.seqlen_k, device="cuda", dtype=torch.bfloat16
        ),
    }
    return {name: values[name]() for name in spec.declarations.tensors}


def call(kernel: attngen.Kernel, inputs: tuple[torch.Tensor, ...], **passed: torch.Tensor) -> timing.Run:
    """A call of the attention kernel alone."""
    return partial(kernel, *((kernel.quantize(*inputs),) if kernel.takes_operands else inputs), **passed)


def time(
    folders: list[Path], out: Path, only: str, lengths: list[int], rounds: int, target_ms: float
) -> None:
    """Print and write how many times as fast as each other tree's kernels this tree's are, point by point."""
    contenders = {
        name: {"here": kernel}
        | {
            folder.name: attngen.Kernel(kernel.spec, kernel.call, source=(folder / f"{name}.cu").read_text())
            for folder in folders
        }
        for name, kernel in kernels(only)
    }
    with ThreadPoolExecutor(16) as pool:
        list(
            pool.map(
                attngen.Kernel.compile, [each for texts in contenders.values() for each in texts.values()]
            )
        )
    rows = []
    for name, texts in contenders.items():
        plan, spec = texts["here"].plan, texts["here"].spec
        for length in lengths:
            if plan.up_to is not None and length > plan.up_to:
                continue
            shape = timing.grid_shape(length, plan.head_dim_qk)
            dtype = torch.float16 if plan.inputs.name == "f16" else torch.bfloat16
            inputs = random_inputs(shape, plan.head_dim_qk, plan.head_dim_v, dtype, "cuda", 0)
            passed = declared(spec, shape)
            runs = {tree: call(kernel, inputs, **passed) for tree, kernel in texts.items()}
            samples = timing.measure(runs, rounds, target_ms)
            here = median(samples["here"])
            # Of samples that stand next to each other: within a point the clock steps by a tenth.
            ratios = {
                folder.name: median(
                    there / ours for there, ours in zip(samples[folder.name], samples["here"], strict=True)
                )
                for folder in folders
            }
            rows.append({"kernel": name, "seqlen": length, "ratios": ratios, "ms": samples})
            print(
                f"{name:28} {length:6} {here:8.4f} ms",
                *(f"{ratio:.4f}" for ratio in ratios.values()),
                flush=True,
            )
            del inputs, passed, runs
    summary = {}
    for folder in folders:
        ratios = [row["ratios"][folder.name] for row in rows]
        summary[folder.name] = {"geometric_mean": timing.geometric_mean(ratios), "least": min(ratios)}
    print(summary, f"of {len(rows)} points")
    timing.write_json(out / "before_after.json", rows, summary=summary)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("write", "time"))
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument(
        "--only", default="", help="a regular expression that names of specs are searched for"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--target-ms", type=float, default=15.0)
    given = parser.parse_args()
    if given.what == "write":
        write(given.folders[0])
    else:
        time(given.folders, given.out, given.only, given.lengths, given.rounds, given.target_ms)
