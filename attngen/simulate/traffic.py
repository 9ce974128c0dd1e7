"""FLOPs and bytes of a launch: as counted while a program runs, and as formulas.

Bytes are those that Steps ask of device memory, valid rows and columns only; what the L2 cache saves is not
known here. The standard algorithm is the yardstick: S and P go to device memory and come back.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from attngen.dtypes import DType
from attngen.plan import KernelPlan
from attngen.plan.steps import Product, walk
from attngen.simulate.tile_lists import call_sizes
from attngen.simulate.visits import (
    Member,
    Sizes,
    all_blocks,
    block_bounds,
    heads_alike,
    rows_of,
    visited_blocks,
)
from attngen.torch_state import torch_defaults


@dataclass
class Traffic:
    """What a launch costs.

    Attributes:
        flops: of the matrix products as executed, on whole padded tiles.
        useful_flops: of these, the ones on rows, keys and columns that exist, masked or not.
        read: bytes read from device memory, by place.
        written: bytes written to it, by place.
    """

    flops: int = 0
    useful_flops: int = 0
    read: dict[str, int] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)

    def count_gemm(self, times: int, padded: tuple[int, int, int], useful: tuple[int, int, int]) -> None:
        """Count `times` products of rows x cols, contracted over k."""
        self.flops += 2 * times * padded[0] * padded[1] * padded[2]
        self.useful_flops += 2 * times * useful[0] * useful[1] * useful[2]

    def count_read(self, place: str, size: int) -> None:
        """Count bytes read from a place."""
        self.read[place] = self.read.get(place, 0) + size

    def count_written(self, place: str, size: int) -> None:
        """Count bytes written to a place."""
        self.written[place] = self.written.get(place, 0) + size

    @property
    def bytes_read(self) -> int:
        """Bytes read from device memory."""
        return sum(self.read.values())

    @property
    def bytes_written(self) -> int:
        """Bytes written to device memory."""
        return sum(self.written.values())

    @property
    def bytes_moved(self) -> int:
        """Bytes moved to and from device memory."""
        return self.bytes_read + self.bytes_written


@torch_defaults()
def closed_form(
    plan: KernelPlan,
    seqlen_q: int,
    seqlen_k: int,
    batch: int = 1,
    heads: int = 1,
    heads_kv: int | None = None,
    *,
    return_lse: bool = False,
    declared: Mapping[str, Any] | None = None,
    tokens: tuple[int, int] = (0, 0),
) -> Traffic:
    """What `count` counts, from the numbers of blocks alone: what the schedule's authors say it costs.

    Blocks of keys that depend on what `declared` does not hold are all visited. Of sequences that have lengths of their
    own it holds these, and `tokens` says how many there are of ragged queries and keys.
    """
    sizes = call_sizes(plan, seqlen_q, seqlen_k, batch, heads, heads_kv, declared, tokens)
    if sizes.has_no_output:
        return Traffic()
    alike = heads_alike(plan, sizes)
    return _total((_of_head(plan, sizes, members[0], return_lse), len(members)) for members in alike)


@torch_defaults()
def executed_flops(plan: KernelPlan, sizes: Sizes) -> int:
    """FLOPs of the products that a kernel executes on a call, padded ones too: what `Traffic.flops` comes to.

    Every pair of blocks that it visits has each of its products once, wherever they stand in the program.
    """
    products = {
        (step.acc, step.first_column): step for step in walk(plan.worker.program) if isinstance(step, Product)
    }
    of_pair = sum(2 * each.acc.rows * each.acc.cols * each.depth for each in products.values())
    return of_pair * sum(len(heads) * _pairs(plan, sizes, heads[0]) for heads in heads_alike(plan, sizes))


def _pairs(plan: KernelPlan, sizes: Sizes, member: Member) -> int:
    """Pairs of blocks of queries and of keys that a head visits, or that the group of a head of keys does."""
    if plan.scheduler.kind != "key_blocks":
        return sum(map(len, visited_blocks(plan, sizes, all_blocks(plan, sizes, member), member)))
    group = (member._replace(head=member.head + place) for place in range(sizes.group))
    if plan.key_blocks is None:
        return sum(
            len(n) for each in group for n in visited_blocks(plan, sizes, all_blocks(plan, sizes, each), each)
        )
    blocks = range(-(-member.seqlen_k // plan.block_n))
    return sum(seen.n_max - seen.n_min for each in group for seen in block_bounds(plan, sizes, blocks, each))


def _of_head(plan: KernelPlan, sizes: Sizes, member: Member, return_lse: bool) -> Traffic:
    """What one head costs."""
    rows_of_head, seqlen_k = rows_of(plan, sizes, member), member.seqlen_k
    traffic = Traffic()
    loads_q_anyway = bool(plan.rings)  # the producer of a ring fills it for every tile
    pairs, rows_times_keys, rows_loaded, rows_visits, keys_visits = 0, 0, 0, 0, 0
    for m, visited in enumerate(visited_blocks(plan, sizes, all_blocks(plan, sizes, member), member)):
        rows = min(plan.block_m, rows_of_head - m * plan.block_m)
        blocks = len(visited)
        keys = sum(min(plan.block_n, seqlen_k - n * plan.block_n) for n in visited)
        pairs += blocks
        rows_times_keys += rows * keys
        rows_loaded += rows if blocks or loads_q_anyway else 0
        rows_visits += rows * blocks
        keys_visits += keys
    dims, f32 = plan.head_dim_qk + plan.head_dim_v, 4
    q_row, k_row, v_row = (tensor.cols * tensor.dtype.bytes for tensor in plan.reads)
    o_row = plan.head_dim_v * f32
    traffic.flops = 2 * pairs * plan.block_m * plan.block_n * (plan.qk_cols + plan.v_cols)
    traffic.useful_flops = 2 * rows_times_keys * dims
    if member.parts > 1:
        traffic.written = {place.name: rows_of_head * (place.cols or 1) * f32 for place in plan.parts}
    else:
        traffic.written = {"out": rows_of_head * plan.head_dim_v * plan.output.bytes}
        if return_lse:
            traffic.written["lse"] = rows_of_head * f32
    if plan.schedule == "serial":
        # K and V once; Q, O and the row statistics at every visit, the sum twice (it rescales O too).
        traffic.read = {"k": seqlen_k * k_row, "v": seqlen_k * v_row, "q": rows_visits * q_row}
        traffic.read |= {
            "o_acc": (rows_visits + rows_of_head) * o_row,
            "saved_max": (rows_visits + rows_of_head) * f32,
        }
        traffic.read["saved_sum"] = (2 * rows_visits + rows_of_head) * f32
        traffic.written |= {"o_acc": (rows_visits + rows_of_head) * o_row}
        traffic.written |= {name: (rows_visits + rows_of_head) * f32 for name in ("saved_max", "saved_sum")}
    else:
        # Q once; K and V once for every block of rows that sees them.
        traffic.read = {"q": rows_loaded * q_row, "k": keys_visits * k_row, "v": keys_visits * v_row}
        traffic.read |= {each.name: keys_visits * f32 for each in plan.descales if each.is_by_key}
    return traffic


def standard_algorithm(
    inputs: DType,
    head_dim_qk: int,
    head_dim_v: int,
    seqlen_q: int,
    seqlen_k: int,
    batch: int = 1,
    heads: int = 1,
) -> Traffic:
    """What the standard algorithm costs: S = Q Kᵀ, P = softmax(S), O = P V, each from and to device memory.

    S and P have the type of the inputs; the mask saves nothing. Source: FlashAttention, arXiv 2205.14135,
    Algorithm 0.
    """
    element, scores = inputs.bytes, seqlen_q * seqlen_k
    flops = 2 * scores * (head_dim_qk + head_dim_v)
    read = {
        "q": seqlen_q * head_dim_qk,
        "k": seqlen_k * head_dim_qk,
        "v": seqlen_k * head_dim_v,
        "s": scores,
        "p": scores,
    }
    written = {"s": scores, "p": scores, "out": seqlen_q * head_dim_v}
    traffic = Traffic(
        flops,
        flops,
        {name: n * element for name, n in read.items()},
        {name: n * element for name, n in written.items()},
    )
    return _total([(traffic, batch * heads)])


def added(parts: Iterable[Traffic]) -> Traffic:
    """What several kernels or calls cost together."""
    return _total((part, 1) for part in parts)


def _total(parts: Iterable[tuple[Traffic, int]]) -> Traffic:
    """The traffic of one head, so many times, of all parts; places that nothing is moved to or from are left out."""
    total = Traffic()
    for of_head, heads in parts:
        total.flops += of_head.flops * heads
        total.useful_flops += of_head.useful_flops * heads
        for name, size in of_head.read.items():
            if size:
                total.count_read(name, size * heads)
        for name, size in of_head.written.items():
            if size:
                total.count_written(name, size * heads)
    return total
