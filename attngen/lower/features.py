"""Features: what a spec says that numbers depend on. Nothing else in lowering reads the spec, but to draw an error."""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from attngen.arch import Arch
from attngen.dtypes import BF16, E4M3, F16, F32, DType, dtype
from attngen.expr import (
    INDEX_NAMES,
    Declarations,
    Expr,
    IndexRange,
    TileClasses,
    blocks_of_tile,
    free_names,
    key_range,
    name,
    nodes,
    row_range,
    tensor_names,
    tile_classes,
    without_blocks,
)
from attngen.plan import Axis, CacheScales, Lengths
from attngen.quantize import ScaleKind
from attngen.scaling import needs_no_maximum
from attngen.schedules import WARPGROUP_SCHEDULES, Pairs
from attngen.schedules.pairs import loads_by_key
from attngen.spec import Spec, SplitKeys

COLUMNS_SEEDED = 128
"""The most columns of Q and K with which the score GEMM adds to something. The tensor core drops bits of accumulators
at each step of 16 columns: of 8192 an H200 lost 0.005 in eight steps and 0.011 in sixteen; added behind, 0.001."""
COLUMNS_PROMOTED = 128
"""The widest head dim at which `precision.promote: auto` is 1: there it costs nothing. Beyond it costs a quarter of the
speed, and at 128k keys without it the error is 1.04 times that at 4k (1.03 with it, head_dim 128)."""


@dataclass(frozen=True)
class Features:
    """What a spec and an arch say, apart from where it is written. Conditions of the tables are on these names.

    Attributes:
        digest: of the spec.
        kind: the schedule that the spec names, or "auto".
        mask, score, declarations: the expressions, and all that they might read.
        scales: what shares a scale of e4m3 inputs; None for others.
        cache: what shares a scale of K and V in a cache of e4m3, beside inputs of 16 bits; None for others.
        promotes: O of e4m3 inputs is added up in true f32 after each block of keys.
        hadamard_seed: of the matrix that Q and K are multiplied by; None where they are not.
        has_sink: a logit for each query head joins the sum of a row.
        given: the fields of a choice that the spec says.
        lengths: how queries and keys are cut into sequences.
        splits: the keys of a tile are cut into parts.
        part_keys: how many keys a part has; None where that is left open.
    """

    arch: Arch
    digest: str
    kind: str
    inputs: DType
    output: DType
    head_dim_qk: int
    head_dim_v: int
    mask: Expr
    score: Expr
    declarations: Declarations
    scales: ScaleKind | None
    cache: CacheScales | None
    promotes: bool
    hadamard_seed: int | None
    gradients: tuple[str, ...]
    deterministic: bool
    has_sink: bool
    given: Mapping[str, Any]
    lengths: Lengths
    splits: bool
    part_keys: int | None

    @classmethod
    def of(cls, spec: Spec, arch: Arch) -> "Features":
        """The features of a spec on a target."""
        precision, dims = spec.precision, spec.problem.head_dim
        inputs = dtype(precision.inputs)
        natural = BF16 if inputs is E4M3 else inputs
        said: Any = precision.scales
        scales: ScaleKind = "per_block" if said == "auto" else said
        of_cache: CacheScales = "per_head" if said == "auto" else said
        promotes = (
            max(dims.qk, dims.v) <= COLUMNS_PROMOTED if precision.promote == "auto" else precision.promote
        )
        values = {**spec.tile.__dict__, **spec.schedule.__dict__}
        kind, order = values.pop("kind"), values.pop("order")
        given = {field: value for field, value in values.items() if value != "auto"}
        return cls(
            arch=arch,
            digest=spec.digest(),
            kind=kind,
            inputs=inputs,
            output=natural if precision.output == "auto" else dtype(precision.output),
            head_dim_qk=dims.qk,
            head_dim_v=dims.v,
            mask=spec.mask_expr,
            score=spec.score_expr,
            declarations=spec.declarations,
            scales=scales if inputs is E4M3 else None,
            cache=of_cache if precision.cache == "e4m3" else None,
            promotes=inputs is E4M3 and bool(promotes),
            hadamard_seed=precision.seed if precision.incoherent == "hadamard" else None,
            gradients=spec.gradients,
            deterministic=spec.deterministic,
            has_sink=spec.has_sink,
            given=given if order == "auto" else {**given, "longest_first": order == "heads"},
            lengths=Lengths(spec.problem.queries, spec.problem.keys),
            splits=spec.split != "none",
            part_keys=spec.split.keys if isinstance(spec.split, SplitKeys) else None,
        )

    def saying(self, field: str, value: int) -> "Features":
        """The features of a spec that says another value of one number; what has been worked out is kept."""
        other = copy(self)
        object.__setattr__(other, "given", {**self.given, field: value})
        return other

    @property
    def blocks(self) -> tuple[int, int] | None:
        """Rows and keys of the blocks of which calls say which are kept; None where they do not."""
        return self.declarations.blocks

    @property
    def has_e4m3_cache(self) -> bool:
        """K and V lie in a cache of e4m3, beside queries of 16 bits."""
        return self.cache is not None

    @property
    def multiplied(self) -> DType:
        """The format of what is multiplied: of e4m3 beside 16 bits f16, which has all of its numbers."""
        return F16 if self.cache else self.inputs

    @property
    def is_paged(self) -> bool:
        """Keys lie in pages."""
        return self.lengths.is_paged("keys")

    @property
    def head_dim(self) -> int:
        """The wider of the two."""
        return max(self.head_dim_qk, self.head_dim_v)

    @property
    def fits_instructions(self) -> bool:
        """Whether tiles are multiples of a matrix instruction; on the simulator any tile will do."""
        return self.arch.has_mma_granularity

    @cached_property
    def pairs(self) -> Pairs:
        """The mask and the score, taken apart."""
        return Pairs.of(self.mask, self.score, self._sorted_tensors)

    @cached_property
    def visible_rows(self) -> IndexRange | None:
        """The rows that see a key, where they have a closed form."""
        return row_range(self.mask, self._sorted_tensors)

    @property
    def _sorted_tensors(self) -> frozenset[str]:
        """Those whose order makes bounds."""
        return self.declarations.sorted_tensors if self._has_tables else frozenset()

    @property
    def _has_tables(self) -> bool:
        """Boundaries and tables have no place for sequences of any length, nor for rows of several heads."""
        return self.lengths.are_dense and not self.splits

    def mask_of(self, axis: Axis) -> Expr:
        """The mask as it is asked of a pair where tiles are of queries, or of keys.

        Where boundaries are found for these, they are loaded once for each; elements would be for each pair.
        """
        visible = self.pairs.visible if axis == "queries" else self.visible_rows
        if visible is None or not visible.boundaries:
            return self.mask
        return visible.holds("kv_idx" if axis == "queries" else "q_idx")

    @cached_property
    def seeded_pairs(self) -> Pairs:
        """The mask and the score where wgmma, which accumulates, may start from what the score adds to the product.

        e4m3's sums are too coarse for it, and f16's P shows what they drop.
        """
        can_seed = self.inputs in (BF16, F32) and self.head_dim_qk <= COLUMNS_SEEDED
        return self.pairs.seeded() if can_seed else self.pairs

    def pairs_of(self, schedule: str) -> Pairs:
        """The mask and the score as a schedule works them out."""
        return self.seeded_pairs if schedule in WARPGROUP_SCHEDULES else self.pairs

    @property
    def packs_group(self) -> bool:
        """A tile's rows are those of all query heads that share its keys; none of them is asked for by its number."""
        return self.splits and "h" not in free_names(self.mask) | free_names(self.score)

    @property
    def upper(self) -> bool:
        """The mask has an upper bound, so that rows of a head see more and more keys."""
        return not self.walks and bool(self.pairs.visible and self.pairs.visible.upper)

    @property
    def lower(self) -> bool:
        """The mask has a lower bound, as windows have."""
        return not self.walks and bool(self.pairs.visible and self.pairs.visible.lower)

    @property
    def walks(self) -> bool:
        """Blocks of keys are classed one by one."""
        return self.pairs.visible is None

    def classes(self, block_m: int = 1, block_n: int = 1) -> TileClasses:
        """How blocks of so many keys are classed one by one."""
        return tile_classes(self.mask, self._has_tables, block_m, block_n)

    @property
    def has_score(self) -> bool:
        """The score is anything but the scaled product."""
        return self.pairs.modifies_scores

    @property
    def modified(self) -> bool:
        """Scores are modified when the score GEMM of warpgroups has landed."""
        return self.seeded_pairs.modifies_scores

    @property
    def seeded(self) -> bool:
        """The score GEMM of warpgroups adds to something."""
        return self.seeded_pairs.added is not None

    @cached_property
    def caps_product(self) -> bool:
        """The score is a tanh of the product and scalars, times scalars, before or behind which nothing looks up."""
        return self.by_tanh and is_capped_product(self.seeded_pairs.score)

    @cached_property
    def by_tanh(self) -> bool:
        """The score is made of the product's tanh alone, which is instructions, not exponentials, while it is small."""
        return self.seeded_pairs.by_tanh is not None

    @cached_property
    def needs_maximum(self) -> bool:
        """Exponentials are taken relative to a maximum; bounded scores of 16 bits are exponents as they are."""
        return self.scales is not None or not needs_no_maximum(
            self.pairs.magnitude, self.multiplied.max_finite
        )

    @property
    def loads(self) -> bool:
        """Something is looked up for each pair."""
        return self.mask_loads or self.score_loads

    @cached_property
    def mask_loads(self) -> bool:
        """The mask looks something up for each pair, in partial blocks."""
        mask = self.mask if self.asks_for_blocks else without_blocks(self.mask)
        return self.walks and bool(loads_by_key(mask))

    @cached_property
    def asks_for_blocks(self) -> bool:
        """Each pair of a partial tile is asked whether its block is kept: not even the smallest tile lies in one."""
        arch, given = self.arch, self.given
        rows = arch.wgmma.m if arch.wgmma and self.kind in ("auto", *WARPGROUP_SCHEDULES) else arch.mma.m
        tile = given.get("block_m", rows), given.get("block_n", arch.k_step(self.inputs))
        return blocks_of_tile(self.mask, *tile) not in (None, (1, 1))

    @property
    def masks_by_interval(self) -> bool:
        """What is asked of the pairs of a partial tile is an interval of keys, if it lies in one given block."""
        return key_range(without_blocks(self.mask)) is not None

    @cached_property
    def score_loads(self) -> bool:
        """The score looks something up for each pair, in every block."""
        return bool(loads_by_key(self.pairs.score))

    @cached_property
    def lookups_by_key(self) -> Mapping[Expr, DType]:
        """Lookups of the score whose 16-bit elements two neighbouring keys may find side by side, and their formats.

        The last index is the key itself, and nothing else of them depends on the key or the product.
        """
        tensors = self.declarations.tensors
        return {
            each: dtype(tensors[each.name].dtype)
            for each in nodes(self.score)
            if each.op == "lookup"
            and each.args[-1] is name("kv_idx")
            and tensors[each.name].dtype in ("f16", "bf16")
            and not any(free_names(index) & {"kv_idx", "score"} for index in each.args[:-1])
        }

    @cached_property
    def adds_a_bias(self) -> bool:
        """The score is + - * alone, and all that it looks up for each key is one of `lookups_by_key`."""
        score = self.pairs.score
        loads = loads_by_key(score)
        if len(loads) != 1 or set(loads) != self.lookups_by_key.keys():
            return False
        rest = set(nodes(score)) - set(nodes(*loads))
        return all(each.op in ("const", "name", "lookup") or each.name in ("+", "-", "*") for each in rest)


def is_capped_product(score: Expr) -> bool:
    """Whether it is tanh of the product and scalars, times scalars."""
    while score.op == "arith" and score.name == "*":
        a, b = score.args
        score = a if "score" in free_names(a) else b
    return score.name == "tanh" and not tensor_names(score) and free_names(score).isdisjoint(INDEX_NAMES)
