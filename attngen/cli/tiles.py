"""The tiles of a call: which blocks of keys each block of rows skips, masks, or takes whole; drawn in SVG or PNG."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

from attngen.bind import check_declared
from attngen.check.caches import drawn_descales
from attngen.check.inputs import Shape
from attngen.cli.picture import figure_panels
from attngen.cli.shapes import GivenSizes, cut_shape, shape_text
from attngen.errors import ArgumentError
from attngen.expr import GIVEN_BLOCKS, Declarations, evaluate
from attngen.kernel import Kernel
from attngen.plan import Axis, KernelPlan
from attngen.simulate import Sizes, block_bounds, call_sizes
from attngen.simulate.visits import DECODED, Member, asks_for, ceil_div, walk_of
from attngen.spec import Spec

EMPTY, PARTIAL, FULL = 0, 1, 2
NO_TILE = -1
"""Of blocks of rows and of keys that are not of one sequence."""
CLASSES = ("empty", "partial", "full")
"""What a tile is: skipped, masked, taken without a mask."""
SHAPE_TO_DRAW = Shape(batch=1, heads=1, heads_kv=1, seqlen_q=4096, seqlen_k=4096)
"""Where no shape is given."""
LENGTHS_TO_DRAW = (1500, 200, 1000, 0, 700, 696)
"""Of its rows and keys, where sequences have lengths of their own."""
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
    """The classes of the tiles of one head: of the first sequence, or of each where they have lengths of their own.

    Attributes:
        mask: as the spec writes it.
        plan: which takes the call.
        shape: of the call.
        sequences: whose tiles these are.
        classes: (blocks of rows, blocks of keys) of all of them, indices into `CLASSES`, or `NO_TILE`.
        needed: tiles that hold a visible pair, by asking each pair; None where those are more than `MOST_PAIRS`.
        kept: how many of the head's given blocks are kept, as people read it; empty where none are given.
    """

    mask: str
    plan: KernelPlan
    shape: Shape
    sequences: tuple[Member, ...]
    classes: torch.Tensor
    needed: int | None
    kept: str = ""

    @property
    def count(self) -> int:
        """How many tiles there are."""
        return int((self.classes != NO_TILE).sum())

    @property
    def counts(self) -> dict[str, int]:
        """How many tiles are of each class."""
        return {name: int((self.classes == i).sum()) for i, name in enumerate(CLASSES)}

    @property
    def visited(self) -> int:
        """Tiles that the kernel does not skip."""
        return int((self.classes > EMPTY).sum())

    @property
    def excess(self) -> float | None:
        """Visited tiles over those needed; None where that is not known, or nothing is needed."""
        return self.visited / self.needed if self.needed else None

    def __str__(self) -> str:
        tiles = self.count
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
    sequences = _sequences(shape)
    rows, columns = (sum(map(len, _blocks(plan, axis, sequences))) for axis in ("queries", "keys"))
    launched = rows * shape.heads * (1 if shape.cuts else shape.batch)
    hint = "shorter lengths, fewer heads or a smaller batch show the same"
    if rows * columns > MOST_TILES:
        got = f"{rows} x {columns} tiles of {plan.block_m}x{plan.block_n} in a head"
        raise ArgumentError(
            "--lengths" if shape.cuts else "--seqlen", got, f"at most {MOST_TILES} tiles", hint
        )
    if launched > MOST_ROW_BLOCKS:
        got = f"{shape_text(shape)}, {launched} blocks of {plan.block_m} rows"
        raise ArgumentError("--batch, --heads", got, f"at most {MOST_ROW_BLOCKS} blocks", hint)


def check_passed(kernel: Kernel, shape: Shape, declared: Mapping[str, Any]) -> dict[str, Any]:
    """What a call passes for masks and scores to read, on the CPU: scalars, defaults included, and tensors.

    Raises:
        ArgumentError: a value that the kernel does not take.
    """
    manifest = kernel.manifest
    of_q, of_k = shape.tokens
    of_call = (shape.batch, shape.seqlen_q, shape.seqlen_k, shape.heads, shape.heads_kv)
    sizes = Sizes(*of_call, tokens_q=of_q, tokens_k=of_k).values | shape.page_sizes
    passed = {**declared, **drawn_descales(kernel.spec, shape)}
    tensors, scalars, _ = check_declared(manifest, manifest.intakes[0], passed, sizes, torch.device("cpu"))
    return {**scalars, **{name.removeprefix("tensor."): x for name, x in tensors.items()}}


def sizes_of_call(plan: KernelPlan, shape: Shape, passed: Mapping[str, Any]) -> Sizes:
    """What the simulator wants to know of a call that is not run; `passed` has its lengths, where there are any."""
    of_call = (shape.seqlen_q, shape.seqlen_k, shape.batch, shape.heads, shape.heads_kv)
    return call_sizes(plan, *of_call, passed, shape.tokens)


def tile_map(kernel: Kernel, shape: Shape, declared: Mapping[str, Any]) -> TileMap:
    """The classes of the tiles of the first head of a call: of its first sequence, or of each as of `TileMap`.

    Args:
        kernel: of the call; of its attention kernels the one that takes it is shown.
        shape: of the call.
        declared: what the call passes by name, on the CPU.

    Raises:
        ArgumentError: a declared value that the kernel does not take.
    """
    plan = kernel.call.serving({"seqlen_k": shape.seqlen_k})
    passed = check_passed(kernel, shape, declared)
    kept = _kept_blocks(kernel.spec.declarations, passed)
    sequences = _sequences(shape)
    rows, columns = (_blocks(plan, axis, sequences) for axis in ("queries", "keys"))
    classes = torch.full((sum(map(len, rows)), sum(map(len, columns))), NO_TILE, dtype=torch.int64)
    if not sequences:
        return TileMap(kernel.spec.mask, plan, shape, sequences, classes, needed=0, kept=kept)
    sizes = sizes_of_call(plan, shape, passed)
    for each, own_rows, own_columns in zip(sequences, rows, columns, strict=True):
        if own_rows and own_columns:
            at = (slice(own_rows[0], own_rows[-1] + 1), slice(own_columns[0], own_columns[-1] + 1))
            classes[at] = _classes_of(plan, sizes, each)
    is_short = sum(each.seqlen_q * each.seqlen_k for each in sequences) <= MOST_PAIRS
    needed = sum(_needed(plan, sizes, each) for each in sequences) if is_short else None
    return TileMap(kernel.spec.mask, plan, shape, sequences, classes, needed, kept)


def _sequences(shape: Shape) -> tuple[Member, ...]:
    """The first head of the first sequence, or of each where they have lengths of their own; none without rows."""
    if not shape.cuts:
        found = [Member(0, 0, 0, shape.seqlen_q, shape.seqlen_k)] if shape.batch else []
    else:
        whole = (repeat((0, length), shape.batch) for length in (shape.seqlen_q, shape.seqlen_k))
        cuts = zip((shape.queries, shape.keys), whole, strict=True)
        of_q, of_k = (cut.spans if cut else each for cut, each in cuts)
        found = [
            Member(b, 0, 0, q_end - q_start, k_end - k_start, q_start, k_start)
            for b, ((q_start, q_end), (k_start, k_end)) in enumerate(zip(of_q, of_k, strict=True))
        ]
    return tuple(found) if shape.heads and any(each.seqlen_q for each in found) else ()


def _blocks(plan: KernelPlan, axis: Axis, sequences: Iterable[Member]) -> list[range]:
    """The places of each sequence's blocks of rows, or of keys, among those of all."""
    of_rows = axis == "queries"
    found, first = [], 0
    for each in sequences:
        length, size = (each.seqlen_q, plan.block_m) if of_rows else (each.seqlen_k, plan.block_n)
        found.append(range(first, first + ceil_div(length, size)))
        first = found[-1].stop
    return found


def _classes_of(plan: KernelPlan, sizes: Sizes, head: Member) -> torch.Tensor:
    """The classes of a sequence's tiles."""
    rows = range(ceil_div(head.seqlen_q, plan.block_m))
    classes = torch.full((len(rows), ceil_div(head.seqlen_k, plan.block_n)), EMPTY, dtype=torch.int64)
    if plan.key_blocks is None:
        for m in rows:
            for block in walk_of(plan, sizes, m, head):
                classes[m, block.n] = PARTIAL if block.is_partial else FULL
    else:
        for row, bounds in zip(classes, block_bounds(plan, sizes, rows, head), strict=True):
            row[bounds.n_min : bounds.n_max] = PARTIAL
            row[bounds.n_full_begin : bounds.n_full_end] = FULL
    return classes


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


def tiles_to_draw(spec: Spec, given: GivenSizes | None) -> Shape:
    """The shape whose tiles are drawn: the one given, else `SHAPE_TO_DRAW`, in sequences where the spec has them."""
    if given is not None:
        return given.shape(spec)
    return cut_shape(spec, {"q": LENGTHS_TO_DRAW, "k": LENGTHS_TO_DRAW}, SHAPE_TO_DRAW)


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


def _needed(plan: KernelPlan, sizes: Sizes, head: Member) -> int:
    """How many tiles of a sequence hold a visible pair."""
    keys = torch.arange(ceil_div(head.seqlen_k, plan.block_n) * plan.block_n)
    names = {**sizes.declared.scalars, **dict(zip(DECODED, head, strict=True)), "kv_idx": keys}
    count = 0
    for first in range(0, head.seqlen_q, plan.block_m):
        rows = torch.arange(first, min(first + plan.block_m, head.seqlen_q))[:, None]
        seen = torch.as_tensor(evaluate(plan.mask, names | {"q_idx": rows}, sizes.declared.tensors))
        pairs = (seen & (keys < head.seqlen_k)).expand(len(rows), -1)
        count += int(pairs.any(0).reshape(-1, plan.block_n).any(1).sum())
    return count


def _edges(lengths: Iterable[int], block: int) -> list[int]:
    """Where blocks begin among the rows of sequences one after another, and where the last one ends."""
    edges = [0]
    for length in lengths:
        first = edges[-1]
        edges += [first + min(end, length) for end in range(block, length + block, block)]
    return edges


def _draw_sequences(axes: Any, tiles: TileMap) -> None:
    """The tiles of sequences one after another, each sequence in a frame of its own."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Rectangle

    plan, members = tiles.plan, tiles.sequences
    rows = _edges((each.seqlen_q for each in members), plan.block_m)
    columns = _edges((each.seqlen_k for each in members), plan.block_n)
    axes.pcolormesh(
        columns,
        rows,
        tiles.classes.numpy(),
        cmap=ListedColormap(("white", *_COLOURS)),
        vmin=NO_TILE,
        vmax=FULL,
        rasterized=True,
    )
    row, column = 0, 0
    for each in members:
        frame: dict[str, Any] = {"fill": False, "edgecolor": "#808080", "linewidth": 0.6}
        axes.add_patch(Rectangle((column, row), each.seqlen_k, each.seqlen_q, **frame))
        row, column = row + each.seqlen_q, column + each.seqlen_k
    axes.set_xlim(-_MARGIN * column, (1 + _MARGIN) * column)
    axes.set_ylim((1 + _MARGIN) * row, -_MARGIN * row)


def _panel(axes: Any, title: str, tiles: TileMap) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    plan = tiles.plan
    height, width = tiles.classes.shape
    after = ", sequence after sequence" if tiles.shape.cuts else ""
    if tiles.shape.cuts and tiles.classes.numel():
        _draw_sequences(axes, tiles)
    elif tiles.classes.numel():
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
    axes.set_xlabel(f"key (tiles of {plan.block_n}){after}")
    axes.set_ylabel(f"query (tiles of {plan.block_m}){after}")
    needed = "not counted" if tiles.needed is None else tiles.needed
    of_batch = "" if tiles.shape.cuts else " of batch 0"
    lines = (
        title,
        f"mask: {_short(tiles.mask)}" + (f"; {tiles.kept}" if tiles.kept else ""),
        shape_text(tiles.shape) + (f", head 0{of_batch}" if any(asks_for(plan)) else ""),
        f"{tiles.visited} of {tiles.count} tiles visited; with a visible pair: {needed}",
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
