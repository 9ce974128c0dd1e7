"""Times choices of a set of specs beside the tables' own: `python benchmarks/tune.py SET OUT`.

A set is specs and what is varied of a choice. Candidates of a spec are the rows that its table has for it, and what
differs from one of them by one value and passes the rules. Those that are wrong on small odd shapes are reported and
not timed. The others are timed in one process, interleaved in an order that changes; `tune_SET.json` has the samples,
and what is printed at the end is a case for the table in attngen/lower/tables.
"""

import argparse
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any

import attngen
from attngen.arch import ARCHS
from attngen.check import timing
from attngen.check.declared_inputs import declared_inputs
from attngen.check.inputs import Shape
from attngen.check.judging import draw, judge
from attngen.cli.variants import compile_all
from attngen.lower import Features, build
from attngen.lower.choice import AnyChoice, WarpgroupChoice
from attngen.lower.table import PARTS, offers, rows, slice_of
from attngen.plan import assemble
from attngen.plan.hardware_rules import verify
from attngen.schedules import WARPGROUP_SCHEDULES
from attngen.spec import Spec

ARCH = ARCHS["sm_90a"]
ODD_SHAPES = tuple(Shape(2, 6, 2, *lengths) for lengths in ((113, 203), (300, 515), (1, 1)))
TENSORS = {"slopes": "f32[num_heads_q]", "bias": "bf16[num_heads_q, seqlen_q, seqlen_k]"}
TILES = ((64, 1), (128, 2), (192, 3))
TOLD = ("upper", "lower", "walks", "has_score", "modified", "seeded", "loads", "scales", "promotes")
"""Features that a printed case names where they hold."""
Numbers = Mapping[str, tuple[Any, ...]]
"""Values by fields of a choice; of `tile` they are block_m and who shares its rows, of `schedule` names."""
Candidates = Mapping[str, tuple[str, AnyChoice]]
"""Schedule and numbers, by a label."""


@dataclass(frozen=True)
class Set:
    """What is tuned together.

    Attributes:
        specs: documents, target and head dim left out.
        head_dims: of Q and K, and of V.
        varied: of each of the tables' rows.
        width: heads x head_dim of the calls that are timed.
        peers: beside which those are timed that they take.
        lengths: of queries and of keys.
    """

    specs: tuple[Mapping[str, Any], ...]
    head_dims: tuple[tuple[int, int], ...]
    varied: Numbers
    width: int = timing.WIDTH
    peers: tuple[str, ...] = ("cudnn",)
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)

    def loaded(self) -> Iterator[Spec]:
        """Every spec with every head dim."""
        for qk, v in self.head_dims:
            for document in self.specs:
                words = f"{document.get('mask', '')} {document.get('score', '')}"
                tensors = {name: type_ for name, type_ in TENSORS.items() if name in words}
                problem = {"head_dim": {"qk": qk, "v": v}}
                yield attngen.load({"target": ARCH.name, "problem": problem, "tensors": tensors, **document})


def combined(masks: Iterable[str], *others: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Each mask with each of the rest of a document."""
    return tuple({"mask": mask, **other} for mask in masks for other in others)


PLAIN: Mapping[str, Any] = {}
FLAGS: Numbers = {
    "schedule": tuple(WARPGROUP_SCHEDULES),
    "rescale": ("middle", "last"),
    "passes_late": (False, True),
    "q_stages": (1, 2),
    "integer_maxima": (False, True),
}
BOTH = ("full", "causal")
SETS = {
    "fa2": Set(
        combined(BOTH, {"schedule": {"kind": "fa2"}}),
        ((64, 64), (128, 128)),
        {
            "tile": ((128, 4), (64, 4), (128, 8)),
            "block_n": (32, 48, 64, 96, 128),
            "stages": (1, 2),
            "score_unroll": (2, 4),
            "blocks_per_sm": (1, 3),
        },
        peers=("flash", "cudnn"),
        lengths=(1024, 4096, 16384),
    ),
    "warpgroups": Set(
        combined(BOTH, PLAIN),
        ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)),
        {
            **FLAGS,
            "tile": TILES,
            "block_n": (64, 80, 96, 112, 128),
            "stages": (2, 3, 4),
            "rescale_votes": (False, True),
            "out_over_q": (False, True),
        },
    ),
    "scores": Set(
        combined(
            BOTH,
            {"score": "score + alibi(slopes)"},
            {"score": "softcap(score + alibi(slopes), 30.0)"},
            {"score": "score / (1.0 + abs(score))"},
        ),
        ((64, 64), (128, 128)),
        {**FLAGS, "tile": TILES, "block_n": (64, 80, 96, 112, 128), "stages": (2, 3)},
        peers=(),
        lengths=(1024, 4096, 16384),
    ),
    "tanh": Set(
        combined(BOTH, {"score": "softcap(score, 30.0)"}),
        ((64, 64), (128, 128)),
        {**FLAGS, "tile": TILES, "block_n": (64, 80, 96, 112, 128), "stages": (2, 3)},
        peers=(),
        lengths=(1024, 4096, 16384),
    ),
    "overlap": Set(
        combined(BOTH, PLAIN, {"score": "score + bias[h, q_idx, kv_idx]"}, {"score": "softcap(score, 30.0)"})
        + combined(("window(1024, 0)",), PLAIN, {"score": "softcap(score, 30.0)"}),
        ((64, 64), (128, 128), (256, 256)),
        {**FLAGS, "overlap": (True, False), "block_n": (32, 48, 80, 96, 112, 128, 160, 176), "tile": TILES},
        width=512,
        lengths=(1024, 4096, 16384),
    ),
    "8bit": Set(
        tuple(
            {**document, "precision": {"inputs": "e4m3", "scales": scales, "promote": promote}}
            for scales in ("per_head", "per_block", "per_token")
            for promote in (0, 1)
            for document in (
                *combined(BOTH, PLAIN),
                {"mask": "window(1024, 0)"},
                {"mask": "causal", "score": "softcap(score, 30.0)"},
            )
        ),
        ((64, 64), (128, 128), (256, 256)),
        {
            **FLAGS,
            "tile": TILES,
            "block_n": (32, 64, 96, 128, 160, 192, 224),
            "stages": (2, 3, 4),
            "overlap": (True, False),
            "part_cols": tuple(PARTS),
        },
        lengths=(1024, 4096, 16384),
    ),
}


def candidates(spec: Spec, varied: Numbers, steps: int = 1) -> dict[str, tuple[str, AnyChoice]]:
    """The table's rows, then what is up to `steps` values away from one of them and passes the rules, by label."""
    features = Features.of(spec, ARCH)
    if features.kind == "auto":
        found: dict[tuple[str, AnyChoice], None] = dict.fromkeys(
            (row.schedule, row.choice) for row in rows(features)
        )
    else:
        found = {(features.kind, offers(features, features.kind)[0]): None}
    for _ in range(steps):
        found |= dict.fromkeys([each for start in found for each in _varied(*start, varied, features)])
    return {label(*each): each for each in found if not verify(build(features, *each))}


def _varied(
    schedule: str, choice: AnyChoice, varied: Numbers, features: Features
) -> Iterator[tuple[str, AnyChoice]]:
    """A schedule and a choice with one value changed at a time."""
    owners = "warpgroups" if isinstance(choice, WarpgroupChoice) else "warps"
    for name, value in ((name, value) for name, values in varied.items() for value in values):
        if name == "schedule":
            yield value, choice
        elif name == "tile":
            yield schedule, replace(choice, block_m=value[0], **{owners: value[1]})
        elif name != "part_cols":
            yield schedule, replace(choice, **{name: value})
        elif features.promotes and isinstance(choice, WarpgroupChoice):
            yield schedule, replace(choice, part_cols=slice_of(features.head_dim_v, PARTS[value]))


def label(schedule: str, choice: AnyChoice) -> str:
    """Schedule and tile, then what differs from the defaults."""
    owners = choice.warpgroups if isinstance(choice, WarpgroupChoice) else choice.warps
    defaults = {each.name: each.default for each in fields(choice)}
    numbers = ("block_m", "block_n", "stages", "warps", "warpgroups")
    more = (
        f"{name}={value}"
        for name, value in vars(choice).items()
        if name not in numbers and value != defaults[name]
    )
    return " ".join([schedule, f"{choice.block_m}x{choice.block_n}x{choice.stages}/{owners}", *more])


def kernels_of(spec: Spec, found: Candidates) -> dict[str, attngen.Kernel]:
    """A kernel of every candidate, compiled; the whole call, since that of e4m3 inputs quantises."""
    features = Features.of(spec, ARCH)
    kernels = {
        name: attngen.Kernel(spec, assemble((build(features, *each),))) for name, each in found.items()
    }
    for error in filter(None, compile_all(kernels.values()).values()):
        raise error
    return kernels


def is_right(kernel: attngen.Kernel) -> bool:
    """Whether the kernel is within the bound on small odd shapes."""
    for seed, shape in enumerate(ODD_SHAPES):
        q, k, v = draw(kernel.plan, shape, "cuda", seed)
        declared = declared_inputs(kernel.plan.declarations, shape, "cuda", seed)
        out, lse = kernel(q, k, v, return_lse=True, **declared)
        accuracy = judge(kernel.spec, kernel.plan, out, lse, q, k, v, declared=declared)
        if not accuracy.ok:
            print("WRONG", kernel.plan.name, shape, accuracy, flush=True)
            return False
    return True


def timed(
    spec: Spec, of: Set, kernels: Mapping[str, attngen.Kernel], length: int, **how: Any
) -> dict[str, Any]:
    """Samples of every kernel and peer at one length. Operands of e4m3 are packed before."""
    plan = next(iter(kernels.values())).plan
    shape = timing.grid_shape(length, plan.head_dim_qk, width=of.width)
    q, k, v = draw(plan, shape, "cuda")
    declared = declared_inputs(plan.declarations, shape, "cuda")
    runs: dict[str, timing.Run] = {}
    for name, kernel in kernels.items():
        passed = (kernel.quantize(q, k, v),) if kernel.takes_operands else (q, k, v)
        runs[name] = partial(kernel, *passed, **declared)
    causal = spec.mask == "causal"
    if spec.score == "score" and (causal or spec.mask == "full"):
        runs |= timing.peers(q, k, v, causal, of.peers)
    samples = timing.measure(runs, **how)
    row = {"seqlen": length, "ms": samples}
    if spec.mask in BOTH:
        point = timing.Point(shape, plan.head_dim_qk, plan.head_dim_v, causal)
        row["tflops"] = timing.summary(samples, point.flops)
    return row


def case(spec: Spec, name: str, found: Candidates, measured: list[dict[str, Any]]) -> str:
    """The fastest candidates by length, as a case of a table: neighbouring lengths of one winner are one row."""
    features = Features.of(spec, ARCH)
    when: dict[str, Any] = {dim: [getattr(features, dim)] * 2 for dim in ("head_dim_qk", "head_dim_v")}
    when |= {flag: value for flag in TOLD if (value := getattr(features, flag))}
    medians = [(row["seqlen"], {each: median(row["ms"][each]) for each in found}) for row in measured]
    winners = [(length, min(times, key=times.__getitem__)) for length, times in medians]
    runs = [(best, max(length for length, _ in run)) for best, run in groupby(winners, key=itemgetter(1))]
    lines = [f"  - when: {_flow(when)}", "    rows:"]
    for best, longest in runs:
        schedule, choice = found[best]
        numbers: dict[str, Any] = {} if longest == winners[-1][0] else {"up_to": longest}
        numbers |= {"schedule": schedule} if isinstance(choice, WarpgroupChoice) else {}
        defaults = {each.name: each.default for each in fields(choice)}
        numbers |= {key: value for key, value in vars(choice).items() if value != defaults[key]}
        slices = {slice_of(features.head_dim_v, most): part for part, most in PARTS.items()}
        if part := numbers.get("part_cols"):
            numbers["part_cols"] = slices[part]
        lines.append(f"      - {_flow(numbers)}")
    return "\n".join([*lines, f"    script: benchmarks/tune.py {name}", f"    result: tune_{name}.json"])


def _flow(values: Mapping[str, Any]) -> str:
    """A mapping as a table has it."""
    texts = {key: str(value).lower() if isinstance(value, bool) else value for key, value in values.items()}
    return "{" + ", ".join(f"{key}: {value}" for key, value in texts.items()) + "}"


def show(kernels: Mapping[str, attngen.Kernel]) -> None:
    """Compiled candidates, and what they spill."""
    for name, kernel in kernels.items():
        spilled = sum(each.spill_stores for each in kernel.resources)
        print(f"  {name}{f' spills {spilled} bytes' if spilled else ''}", flush=True)


def main(asked: argparse.Namespace) -> None:
    """Time a set's specs, or list and compile their candidates."""
    of, results, cases = SETS[asked.set], [], []
    for spec in of.loaded():
        precision, dims = spec.precision, (spec.problem.head_dim.qk, spec.problem.head_dim.v)
        if asked.head_dims and dims[0] not in asked.head_dims:
            continue
        about: dict[str, Any] = {"head_dim": dims, "mask": spec.mask, "score": spec.score}
        if precision.inputs == "e4m3":
            about |= {"scales": precision.scales, "promote": precision.promote}
        found = dict(islice(candidates(spec, of.varied, asked.steps).items(), asked.most))
        print(*about.values(), f"{len(found)} candidates", flush=True)
        if asked.dry_run == "list":
            print(*(f"  {each}" for each in found), sep="\n")
            continue
        kernels = kernels_of(spec, found)
        if asked.dry_run:
            show(kernels)
            continue
        right = {each: kernel for each, kernel in kernels.items() if is_right(kernel)}
        measured = []
        for length in asked.lengths or of.lengths:
            row = timed(spec, of, right, length, rounds=asked.rounds, target_ms=asked.target_ms)
            best = sorted((median(times), each) for each, times in row["ms"].items())
            print(length, "; ".join(f"{each} {ms:.3f}" for ms, each in best[:5]), flush=True)
            measured.append(row)
        results += [about | row for row in measured]
        cases.append(case(spec, asked.set, {each: found[each] for each in right}, measured))
        timing.write_json(asked.out / f"tune_{asked.set}.json", results, rounds=asked.rounds, table=cases)
    print(*cases, sep="\n")


def arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("set", choices=SETS)
    parser.add_argument("out", type=Path, nargs="?", help="folder for tune_SET.json")
    parser.add_argument(
        "--dry-run",
        nargs="?",
        const="compile",
        choices=("compile", "list"),
        help="list candidates, or compile them",
    )
    parser.add_argument("--head-dims", type=int, nargs="+", help="of Q and K; all of the set's if left out")
    parser.add_argument(
        "--lengths", type=int, nargs="+", help="of queries and of keys; the set's if left out"
    )
    parser.add_argument(
        "--steps", type=int, default=1, help="how many values may differ from a row of the table"
    )
    parser.add_argument("--most", type=int, help="candidates of each spec, the table's first")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--target-ms", type=float, default=15.0, help="of one sample")
    asked = parser.parse_args()
    if asked.out is None and not asked.dry_run:
        parser.error("OUT is the folder that results go to; --dry-run needs none")
    return asked


if __name__ == "__main__":
    main(arguments())
