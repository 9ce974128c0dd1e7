"""Drawing a timeline: lanes of the units and of the roles over cycles, in SVG or PNG. Numbers come from `simulate`."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from attngen.check.inputs import Shape
from attngen.check.timing import CAUSAL, Point, grid_shape
from attngen.cli.occupancy import occupancy
from attngen.cli.output import seconds_text
from attngen.cli.picture import PICTURES, figure_panels
from attngen.cli.shapes import GivenSizes, cut_shape, shape_text
from attngen.errors import ArgumentError
from attngen.kernel import Kernel
from attngen.plan import KernelPlan
from attngen.runtime import KernelResources
from attngen.simulate import UNITS, Interval, Prediction, Timeline
from attngen.simulate.visits import ceil_div

TIMELINES = (*PICTURES, ".txt")
"""What a timeline may be drawn as."""
BLOCKS = 8
"""Blocks of keys of the sequence that is drawn where no length is given."""
MOST_BLOCKS = 2**14
"""Blocks of keys that one tile of the launch may visit, to be simulated in a minute or two."""
MOST_CYCLES = 40_000
"""More than this is not drawn: bars would be thinner than a pixel."""

# Okabe and Ito's colours, which differ for every eye.
_ROLE_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
KINDS = {  # of what a role does, with their colours
    "waits": "#D9D9D9",
    "waits for a GEMM": "#999999",
    "scores to probabilities": "#D55E00",
    "other work": "#56B4E9",
}
_PROBABILITIES = {
    "MaskScores",
    "MaskScoresEach",
    "RowMax",
    "Exponentiate",
    "ConvertP",
    "RecoverP",
    "HidePairs",
    "ScoreGradient",
}
_WAITS = {"WaitFull", "WaitEmpty", "TakeTurn", "SyncThreads", "SyncWarpgroup", "WaitCopies", "WaitStores"}
_SHORT = {
    "Exponentiate": "exp",
    "RecoverP": "P",
    "HidePairs": "P",
    "ScoreGradient": "dS",
    "RowMax": "max",
    "TakeTurn": "turn",
    "MaskScores": "mask",
}


def shape_to_draw(kernel: Kernel, given: GivenSizes | None) -> Shape:
    """The shape given, or one with `BLOCKS` blocks of keys that fills a GPU, in sequences where the spec has them."""
    if given is not None:
        return given.shape(kernel.spec)
    shape = grid_shape(BLOCKS * kernel.plan.block_n, kernel.plan.head_dim_qk)
    lengths = (shape.seqlen_q,) * shape.batch
    return cut_shape(kernel.spec, {"q": lengths, "k": lengths}, shape)


def check_length(plan: KernelPlan, shape: Shape) -> None:
    """Refuse a shape of which one tile takes too long to simulate.

    Raises:
        ArgumentError: it visits more than `MOST_BLOCKS`.
    """
    rows, blocks = ceil_div(shape.seqlen_q, plan.block_m), ceil_div(shape.seqlen_k, plan.block_n)
    what = "keys"
    if plan.scheduler.kind == "heads":  # a tile is a head
        blocks *= rows
    elif plan.scheduler.kind == "key_blocks":
        blocks, what = rows * (shape.heads // max(1, shape.heads_kv)), "queries"
    if blocks > MOST_BLOCKS:
        raise ArgumentError("--timeline", f"{blocks} blocks of {what} in a tile", f"at most {MOST_BLOCKS}")


def resident_blocks(plan: KernelPlan, used: KernelResources | None) -> int:
    """Blocks that share an SM: as launched, else as many as it holds, which ptxas's registers tell."""
    kernel = plan
    if kernel.scheduler.persistent or used is None:
        return kernel.blocks_per_sm
    smem = kernel.smem_bytes + used.static_smem_bytes
    return max(1, occupancy(plan.arch, kernel.threads, used.registers, smem).blocks)


def prediction_line(plan: KernelPlan, shape: Shape, timeline: Timeline, prediction: Prediction) -> str:
    """What the timeline of a kernel comes to, in one line; of a forward pass with its TFLOPS."""
    busy = ", ".join(f"{unit} {timeline.share(unit):.0%}" for unit in UNITS)
    time = f"{seconds_text(prediction.seconds)} at {timeline.costs.clock_hz / 1e9:.3f} GHz"
    if plan.direction == "forward":
        flops = Point(shape, plan.head_dim_qk, plan.head_dim_v, plan.mask is CAUSAL).flops
        time += f", {_tflops(flops, prediction.seconds):.0f} TFLOPS"
    return (
        f"{prediction.tile_cycles:.0f} cycles a tile on an {timeline.costs.name}; busy: {busy}; "
        f"{shape_text(shape)}: {time} predicted"
    )


def backward_line(plan: KernelPlan, shape: Shape, predictions: Iterable[Prediction]) -> str:
    """What the kernels of a backward pass come to, in one line; those that are no programs of Steps are left out."""
    seconds = sum(each.seconds for each in predictions)
    flops = Point(shape, plan.head_dim_qk, plan.head_dim_v, plan.mask is CAUSAL).backward_flops
    tflops = _tflops(flops, seconds)
    return f"backward, {shape_text(shape)}: {seconds_text(seconds)}, {tflops:.0f} TFLOPS predicted, without sheets"


def _tflops(flops: float, seconds: float) -> float:
    return flops / seconds / 1e12 if seconds else 0.0


def draw(timelines: Mapping[str, Timeline], path: Path) -> None:
    """Draw timelines below one another, on one scale of cycles; the same timelines give the same bytes.

    Args:
        timelines: by their titles; at least one.
        path: ends in one of `PICTURES`; folders are made.
    """
    end = min(MOST_CYCLES, max(timeline.cycles for timeline in timelines.values()))
    lanes = [len(UNITS) + len(timeline.roles) for timeline in timelines.values()]
    height = sum(0.42 * count + 1.5 for count in lanes)
    with figure_panels(path, path.suffix, len(lanes), 1, figsize=(16, height), height_ratios=lanes) as panels:
        for axes, (title, timeline) in zip(panels[:, 0], timelines.items(), strict=True):
            _panel(axes, title, timeline, end)


def _panel(axes: Any, title: str, timeline: Timeline, end: int) -> None:
    lanes = (*UNITS, *timeline.roles)
    colours = {role: _ROLE_COLOURS[i % len(_ROLE_COLOURS)] for i, role in enumerate(timeline.roles)}
    bars: dict[tuple[int, str], list[tuple[int, int]]] = {}
    for interval in timeline.intervals:
        if interval.begin < end:
            lane = lanes.index(interval.unit or interval.role)
            colour = colours[interval.role] if interval.unit else KINDS[kind_of(interval)]
            bars.setdefault((lane, colour), []).append((interval.begin, interval.end - interval.begin))
            _label(axes, interval, lane, end)
    for (lane, colour), spans in bars.items():
        axes.broken_barh(spans, (lane - 0.4, 0.8), facecolor=colour, edgecolor="white", linewidth=0.3)
    axes.axhline(len(UNITS) - 0.5, color="black", linewidth=0.8)
    shares = [f"{unit}  {timeline.share(unit):.0%}" for unit in UNITS]
    axes.set_yticks(range(len(lanes)), [*shares, *timeline.roles])
    axes.set_ylim(len(lanes) - 0.5, -0.5)
    axes.set_xlim(0, end)
    axes.set_xlabel("cycles")
    hz = timeline.costs.clock_hz
    above = axes.secondary_xaxis("top", functions=(lambda x: x / hz * 1e6, lambda us: us * hz / 1e6))
    above.set_xlabel(f"us on an {timeline.costs.name} at {hz / 1e9:.3f} GHz")
    cut = f", the first {end} of {timeline.cycles} cycles" if timeline.cycles > end else ""
    tiles = f"{timeline.tiles} tile{'s' * (timeline.tiles != 1)}"
    axes.set_title(f"{title}\n{timeline.name}: {tiles} on one SM{cut}", loc="left", fontsize="medium")
    _legend(axes, {f"for {role}": colour for role, colour in colours.items()} | KINDS)


def _label(axes: Any, interval: Interval, lane: int, end: int) -> None:
    """What a bar is for, where there is room in it."""
    width = interval.end - interval.begin
    block = "" if interval.block is None else f" {interval.block}"
    short = product_text(interval.acc) if interval.acc else _SHORT.get(interval.step, "")
    text = short + block
    if short and width > 0.006 * len(text) * end and interval.begin + width <= end:
        middle = interval.begin + width / 2
        axes.text(middle, lane, text, ha="center", va="center", fontsize="x-small", color="black")


def product_text(acc: str) -> str:
    """What a GEMM is for, by the name of its accumulator: S of acc_s, dP of acc_dp."""
    name = acc.rpartition("_")[2]
    return name[:-1] + name[-1].upper()


def kind_of(interval: Interval) -> str:
    """What a role is about: one of `KINDS`."""
    if interval.step in _WAITS:
        return "waits"
    if interval.step == "WaitGemm":
        return "waits for a GEMM"
    return "scores to probabilities" if interval.step in _PROBABILITIES else "other work"


def _legend(axes: Any, colours: Mapping[str, str]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=colour, label=label) for label, colour in colours.items()]
    axes.legend(
        handles=patches, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small", frameon=False
    )
