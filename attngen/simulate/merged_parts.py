"""What `MergeParts` means: O and lse of the tiles whose keys are cut, from what their parts have come to."""

from collections.abc import Mapping

import torch

from attngen.expr import SINK
from attngen.plan import MergeParts
from attngen.simulate.blocks import scale_params
from attngen.simulate.device_memory import DeviceMemory, by_heads
from attngen.simulate.simulated_softmax import (
    inverse_sum,
    joined,
    log_sum_exp,
    log_sum_exp_of_scores,
    scale_rows_of,
)
from attngen.simulate.tile_source import Tile
from attngen.simulate.visits import Member, Sizes, decoded, rows_of


def merge_parts(
    sheet: MergeParts, values: Mapping[str, torch.Tensor], sizes: Sizes
) -> dict[str, torch.Tensor]:
    """O and lse, the rows of tiles that are cut written where the kernel has left them out."""
    plan = sheet.plan
    sizes = sizes.with_tensors({plan.tile_list: values[plan.tile_list]})
    device = DeviceMemory(by_heads(plan, sizes, values), None, (), plan.lengths, sizes.group)
    heads = sizes.values[plan.listed_heads]
    tiles = decoded(plan, sizes)
    for number, (block, member) in enumerate(tiles):
        if member.parts == 1 or member.part:
            continue
        assert isinstance(block, int)
        first = block * plan.block_m
        rows = range(first, min(first + plan.block_m, rows_of(plan, sizes, member)))
        # Of lengths that lie some have no room.
        numbers = list(range(number, len(tiles), heads))[: member.parts]
        out, lse = _merged(sheet, device, numbers, _sinks(sheet, device, rows, member, sizes), rows, sizes)
        tile = Tile(block, None, None, (member,))
        for tensor in plan.outputs:
            device.write(tensor, tile, first, out.unsqueeze(0), (plan.block_m, tensor.cols))
        for place in filter(device.wants, plan.written_rows):
            device.write(place, tile, first, lse.unsqueeze(0), (plan.block_m,))
    return {name: values[name] for name in sheet.writes if name in values}


def _merged(
    sheet: MergeParts,
    device: DeviceMemory,
    numbers: list[int],
    sinks: torch.Tensor | None,
    rows: range,
    sizes: Sizes,
) -> tuple[torch.Tensor, torch.Tensor]:
    """O (rows, cols) and lse (rows,) of the parts that the tiles of these numbers have left."""
    finish = sheet.finish
    out, sums, *maxima = (device.tensors[place.name][numbers, : len(rows)] for place in sheet.plan.parts)
    scale = 1.0 if finish.is_scaled else scale_params(sheet.plan, sizes.softmax_scale)["softmax_scale_log2"]
    top, weights = torch.zeros(len(rows), dtype=torch.float32), torch.ones_like(sums)
    if maxima:
        top = maxima[0].amax(0)
        weights = torch.exp2((maxima[0] - top) * scale)
    total, merged = (weights * sums).sum(0), (weights.unsqueeze(-1) * out).sum(0)
    by = inverse_sum(total)
    if finish.coarse is None:
        lse = log_sum_exp(top, total, finish.lift)
    else:
        lse = log_sum_exp_of_scores(top, total, scale, finish.coarse, finish.lift)
    if sinks is not None:
        by, lse = joined(by, lse, sinks)
    return scale_rows_of(merged, by), lse


def _sinks(
    sheet: MergeParts, device: DeviceMemory, rows: range, member: Member, sizes: Sizes
) -> torch.Tensor | None:
    """The sink of each of a tile's rows."""
    plan = sheet.plan
    if not plan.has_sink:
        return None
    packed = torch.arange(rows.start, rows.stop) % sizes.group if plan.scheduler.packs_group else 0
    return device.tensors[SINK][torch.full((len(rows),), member.head, dtype=torch.int64) + packed].float()
