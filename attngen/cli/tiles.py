"""The tiles of a call: which blocks of keys each block of rows skips, masks, or takes whole; drawn in SVG or PNG."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from attngen.bind import check_declared
from attngen.check.inputs import Shape
from attngen.cli.picture import figure_panels
from attngen.cli.shapes import shape_text
from attngen.errors import ArgumentError
from attngen.expr import GIVEN_BLOCKS, Declarations, evaluate
from attngen.kernel import Kernel
from attngen.plan import KernelPlan
from attngen.simulate import Sizes, block_bounds
from attngen.simulate.visits import asks_for, ceil_div, declared_values, first_head, walk_of

EMPTY, PARTIAL, FULL = 0, 1, 2
CLASSES = ("empty", "partial", "full")
"""What a tile is: skipped, masked, taken without a mask."""
SHAPE_TO_DRAW = Shape(batch=1, heads=1, heads_kv=1, seqlen_q=4096, seqlen_k=4096)
"""Where no shape is given."""
MOST_PAIRS = 2**28
"""Pairs of query and key that are asked one by one: 16k x 16k, which takes some seconds."""
MOST_TILES = 2**22
"""Tiles of one head whose classes are worked out and drawn: 131,072 keys and queries in tiles of 64x64."""
MOST_ROW_BLOCKS = 2**22
"""Blocks of rows of all heads, each a tile of the launch, that are dealt out one by one."""
TOO_MANY = 1.3
"""Visited tiles over those that hold a visible pair, from which on it is worth a line."""

_COLOURS = ("#F0F0F0", "#E69F00", "#0072B2")  # Okabe and Ito's, which differ for every eye
_PANELS_A_ROW = 3
_MARGIN = 0.01  # so that the frame hides no tile: one of 512 is as wide as its line


@dataclass(frozen=True)
class TileMap:
    """The classes of the tiles of one head.

    Attributes:
        mask: as the spec writes it.
        plan: which takes the call.
        shape: of the call.
        classes: (blocks of rows, blocks of keys), indices into `CLASSES`.
        needed: tiles that hold a visible pair, by asking each pair; None where those are more than `MOST_PAIRS`.
        kept: how many of the head's given blocks are kept, as people read it; empty where none are given.
    """

    mask: str
    plan: KernelPlan
    shape: Shape
    classes: torch.Tensor
    needed: int | None
    kept: str = ""

    @property
    def counts(self) -> dict[str, int]:
        """How many tiles are of each class."""
        return {name: int((self.classes == i).sum()) for i, name in enumerate(CLASSES)}

    @property
    def visited(self) -> int:
        """Tiles that the kernel does not skip."""
        return int((self.classes != EMPTY).sum())

    @property
    def excess(self) -> float | None:
        """Visited tiles over those needed; None where that is not known, or nothing is needed."""
        return self.visited / self.needed if self.needed else None

    def __str__(self) -> str:
        tiles = self.classes.numel()
        counts = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        share = f" ({self.visited / tiles:.1%})" if tiles else ""
        least = "" if self.needed is None else f", {self.needed} hold a visible pair"
        kept = f"; {self.kept}" if self.kept else ""
        return f"{counts}: {self.visited} of {tiles} tiles visited{share}{least}{kept}"


def check_tiles(plan: KernelPlan, shape: Shape) -> None:
    """Refuse a shape whose tiles are too many to be looked at one by one.

    Raises:
        ArgumentError: tiles of a head, or blocks of rows of all heads, pass what is held at once.
    """
    rows, columns = ceil_div(shape.seqlen_q, plan.block_m), ceil_div(shape.seqlen_k, plan.block_n)
    launched = rows * shape.batch * shape.heads
    hint = "shorter lengths, fewer heads or a smaller batch show the same"
    if rows * columns > MOST_TILES:
        got = f"{rows} x {columns} tiles of {plan.block_m}x{plan.block_n} in a head"
        raise ArgumentError("--seqlen", got, f"at most {MOST_TILES} tiles", hint)
    if launched > MOST_ROW_BLOCKS:
        got = f"{shape_text(shape)}, {launched} blocks of {plan.block_m} rows"
        raise ArgumentError("--batch, --heads", got, f"at most {MOST_ROW_BLOCKS} blocks", hint)


def check_passed(kernel: Kernel, shape: Shape, declared: Mapping[str, Any]) -> dict[str, Any]:
    """What a call passes for masks and scores to read, on the CPU: scalars, defaults included, and tensors.

    Raises:
        ArgumentError: a value that the kernel does not take.
    """
    manifest = kernel.manifest
    sizes = Sizes(shape.batch, shape.seqlen_q, shape.seqlen_k, shape.heads, shape.heads_kv).values
    tensors, scalars, _ = check_declared(manifest, manifest.intakes[0], declared, sizes, torch.device("cpu"))
    return {**scalars, **{name.removeprefix("tensor."): x for name, x in tensors.items()}}


def tile_map(kernel: Kernel, shape: Shape, declared: Mapping[str, Any]) -> TileMap:
    """The classes of the tiles of the first head of a call's first batch element.

    Args:
        kernel: of the call; of its attention kernels the one that takes it is shown.
        shape: of the call.
        declared: what the call passes for what the spec declares, on the CPU.

    Raises:
        ArgumentError: a declared value that the kernel does not take.
    """
    plan = kernel.call.serving(shape.seqlen_k)
    sizes = Sizes(shape.batch, shape.seqlen_q, shape.seqlen_k, shape.heads, shape.heads_kv)
    passed = check_passed(kernel, shape, declared)
    kept = _kept_blocks(kernel.spec.declarations, passed)
    is_empty = shape.batch * shape.heads * shape.seqlen_q == 0
    rows = 0 if is_empty else ceil_div(shape.seqlen_q, plan.block_m)
    classes = torch.zeros(rows, ceil_div(shape.seqlen_k, plan.block_n), dtype=torch.int64)
    if is_empty:
        return TileMap(kernel.spec.mask, plan, shape, classes, needed=0, kept=kept)
    sizes = replace(sizes, declared=declared_values(plan, sizes, passed))
    head = first_head(plan, sizes)
    if plan.key_blocks is None:
        for m in range(rows):
            for block in walk_of(plan, sizes, m, head):
                classes[m, block.n] = PARTIAL if block.is_partial else FULL
    else:
        for row, bounds in zip(classes, block_bounds(plan, sizes, range(rows), head), strict=True):
            row[bounds.n_min : bounds.n_max] = PARTIAL
            row[bounds.n_full_begin : bounds.n_full_end] = FULL
    is_short = shape.seqlen_q * shape.seqlen_k <= MOST_PAIRS
    needed = _needed(plan, sizes) if is_short else None
    return TileMap(kernel.spec.mask, plan, shape, classes, needed, kept)


def _kept_blocks(declarations: Declarations, passed: Mapping[str, Any]) -> str:
    """How many of the given blocks of the first head are kept; empty where none are given."""
    if declarations.blocks is None or GIVEN_BLOCKS.name not in passed:
        return ""
    of_head = passed[GIVEN_BLOCKS.name][:1, :1]
    block_m, block_n = declarations.blocks
    return f"{int(of_head.sum())} of {of_head.numel()} blocks of {block_m}x{block_n} kept"


def over_approximated(tiles: TileMap) -> str | None:
    """What to tell where many tiles are visited for nothing."""
    if tiles.excess is None or tiles.excess <= TOO_MANY:
        return None
    return (
        f"{tiles.excess:.2f} times as many tiles as hold a visible pair ({tiles.visited} for {tiles.needed}): "
        "what bounds do not tell apart is visited and masked"
    )


def draw_tiles(maps: Mapping[str, TileMap], path: Path) -> None:
    """Draw maps of tiles side by side; the same maps give the same bytes.

    Args:
        maps: by their titles; at least one.
        path: ends in one of `PICTURES`; folders are made.
    """
    columns = min(_PANELS_A_ROW, len(maps))
    rows = ceil_div(len(maps), columns)
    with figure_panels(path, path.suffix, rows, columns, figsize=(6.5 * columns, 7.2 * rows)) as grid:
        panels = list(grid.flat)
        for axes, (title, tiles) in zip(panels, maps.items(), strict=False):
            _panel(axes, title, tiles)
        for axes in panels[len(maps) :]:
            axes.axis("off")


def _needed(plan: KernelPlan, sizes: Sizes) -> int:
    """How many tiles hold a visible pair."""
    keys = torch.arange(ceil_div(sizes.seqlen_k, plan.block_n) * plan.block_n)
    head = dict(zip(("b", "h", "h_kv"), first_head(plan, sizes), strict=False))
    names = {**sizes.values, **sizes.declared.scalars, **head, "kv_idx": keys}
    count = 0
    for first in range(0, sizes.seqlen_q, plan.block_m):
        rows = torch.arange(first, min(first + plan.block_m, sizes.seqlen_q))[:, None]
        seen = torch.as_tensor(evaluate(plan.mask, names | {"q_idx": rows}, sizes.declared.tensors))
        pairs = (seen & (keys < sizes.seqlen_k)).expand(len(rows), -1)
        count += int(pairs.any(0).reshape(-1, plan.block_n).any(1).sum())
    return count


def _panel(axes: Any, title: str, tiles: TileMap) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    plan = tiles.plan
    height, width = tiles.classes.shape
    if tiles.classes.numel():
        right, bottom = width * plan.block_n, height * plan.block_m
        axes.imshow(
            tiles.classes.numpy(),
            cmap=ListedColormap(_COLOURS),
            vmin=EMPTY,
            vmax=FULL,
            extent=(0, right, bottom, 0),
            aspect="auto",
            interpolation="nearest",
        )
        axes.set_xlim(-_MARGIN * right, (1 + _MARGIN) * right)
        axes.set_ylim((1 + _MARGIN) * bottom, -_MARGIN * bottom)
    axes.set_xlabel(f"key (tiles of {plan.block_n})")
    axes.set_ylabel(f"query (tiles of {plan.block_m})")
    needed = "not counted" if tiles.needed is None else tiles.needed
    lines = (
        title,
        f"mask: {_short(tiles.mask)}" + (f"; {tiles.kept}" if tiles.kept else ""),
        shape_text(tiles.shape) + (", head 0 of batch 0" if any(asks_for(plan)) else ""),
        f"{tiles.visited} of {tiles.classes.numel()} tiles visited; with a visible pair: {needed}",
    )
    axes.set_title("\n".join(lines), loc="left", fontsize="small")
    patches = [
        Patch(facecolor=colour, edgecolor="#808080", label=f"{name}: {count}")
        for colour, (name, count) in zip(_COLOURS, tiles.counts.items(), strict=True)
    ]
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.09)}
    axes.legend(handles=patches, **place, ncols=len(patches), fontsize="small", frameon=False)


def _short(text: str, most: int = 70) -> str:
    """A mask in one line that a panel has room for, and without what matplotlib reads a formula into."""
    line = " ".join(text.split()).replace("$", "")
    return line if len(line) <= most else f"{line[: most - 1]}…"
