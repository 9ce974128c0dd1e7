"""The sheet that lists tiles: its text, run by g++, and its meaning in torch, entry by entry."""

import ctypes
import random
import re
from typing import Any

import pytest
import torch

import attngen
from attngen.emit import emit_module
from attngen.emit.device import used_by
from attngen.plan import KernelPlan, ListTiles, evaluate_formula
from attngen.runtime.prepared import pack
from attngen.simulate.tile_lists import list_tiles
from attngen.simulate.visits import Declared, Sizes
from tests.quantize.on_cpu import CpuKernels

GUARD = 0x5A5A5A5A
LARGEST = 2**31 - 1
PART_COUNT = 9
"""The word of an entry that says how many parts there are."""


class Listing:
    """A kernel that lists tiles, by g++, and what it lists those of."""

    def __init__(
        self, arch: str, schedule: str, queries: str, keys: str, mask: str, split: Any = "none"
    ) -> None:
        problem = {"head_dim": 64, "queries": queries, "keys": keys}
        spec = {"problem": problem, "mask": mask, "schedule": {"kind": schedule}, "split": split}
        call = attngen.compile(spec, arch=arch).call
        self.plan = call.programs[-1]
        self.sheet = ListTiles(self.plan)
        self._entry = call.manifest.kernel_of[self.sheet.name]
        self._kernel = CpuKernels(_text_of(self.plan)).function(self.sheet.name, 0, starts_early=False)

    def run(self, sizes: Sizes, lengths: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the text lists, with memory behind the list that must stay as it is."""
        rows = evaluate_formula(self.sheet.shape[0], sizes.values)
        found = torch.full((rows + 8, self.sheet.entry_words), GUARD, dtype=torch.int32)
        pointers = {
            f"{name}.ptr": x.data_ptr() for name, x in {self.plan.tile_list: found, **lengths}.items()
        }
        nothing = {
            param.value: bytes(128) if param.ctype == "tensor_map" else 0 for param in self.plan.params
        }
        data = pack(self._entry, {**nothing, **sizes.values, **pointers})
        memory = ctypes.create_string_buffer(len(data) + 64)
        start = -(-ctypes.addressof(memory) // 64) * 64
        ctypes.memmove(start, data, len(data))
        self._kernel.run(ctypes.c_void_p(start), 1, self.sheet.threads)
        assert (found[rows:] == GUARD).all()
        return found[:rows]


def _text_of(plan: KernelPlan) -> str:
    """The kernel that lists tiles, of the text that it shares with the attention kernel."""
    text = emit_module((plan,)).partition("// ---- this kernel")[2].partition("\n")[2]
    ahead, _, rest = text.partition('extern "C" __global__')
    sheet = rest[rest.index("// ---- the list") :].partition("// ---- the parts")[0]
    ahead = re.sub(r"^DEV float\* part_of[^\n]*\n", "", ahead, flags=re.MULTILINE)
    ahead = re.sub(r"^using [^\n]*\n", "", ahead, flags=re.MULTILINE)  # tiles in shared memory
    ahead = re.sub(
        r"(template <class Element>\n)?DEV \w+\* \w+_(of|head)\(.*?\n\}\n", "", ahead, flags=re.DOTALL
    )
    library = (part for part in used_by(ahead + sheet) if "template <class Tile" not in part)
    return "\n\n".join([*library, "namespace listing {", ahead, sheet, "}"])


def drawn(
    plan: KernelPlan, batch: int, draw: random.Random, lies: bool
) -> tuple[Sizes, dict[str, torch.Tensor]]:
    """Sizes of a call of so many sequences, and what it says of their lengths, which may be anything."""
    sizes = {
        "seqlen_q": draw.choice((1, 130, 1000)),
        "seqlen_k": draw.choice((1, 130, 5000)),
        "tokens_q": 0,
        "tokens_k": 0,
    }
    lengths: dict[str, torch.Tensor] = {}
    for letter, kind in (("q", plan.lengths.queries), ("k", plan.lengths.keys)):
        longest = sizes[f"seqlen_{letter}"]
        if kind == "ragged":
            starts = [draw.choice((0, 3))]
            for _ in range(batch):
                starts.append(
                    starts[-1] + draw.choice((0, 1, 7, 128, 129, 700, 9_000 if draw.random() < 0.05 else 5))
                )
            longest = sizes[f"tokens_{letter}"] = sizes[f"seqlen_{letter}"] = starts[-1] + draw.choice(
                (0, 1, 300)
            )
            if lies:
                starts = [
                    draw.choice((s, -s, LARGEST, -LARGEST - 1, draw.randrange(-9, longest + 9)))
                    for s in starts
                ]
            lengths[f"cu_seqlens_{letter}"] = torch.tensor(starts, dtype=torch.int32)
        if kind == "padded" or (kind == "ragged" and draw.random() < 0.5):
            low, high = (-LARGEST - 1, LARGEST) if lies else (0, longest)
            used = [draw.choice((0, longest, longest // 2, draw.randint(low, high))) for _ in range(batch)]
            lengths[f"seqused_{letter}"] = torch.tensor(used, dtype=torch.int32)
        if letter == "k" and kind != "dense" and draw.random() < 0.5:
            skipped = [
                draw.choice((0, 1, longest, draw.randint(-5 * lies, longest + 5 * lies)))
                for _ in range(batch)
            ]
            lengths["leftpad_k"] = torch.tensor(skipped, dtype=torch.int32)
    return Sizes(batch, num_heads_q=4, num_heads_kv=2, declared=Declared(), **sizes), lengths


@pytest.mark.parametrize("lies", [False, True])
@pytest.mark.parametrize(
    ("arch", "schedule", "queries", "keys", "mask"),
    [
        ("sm_80", "fa2", "ragged", "ragged", "causal"),
        ("sm_80", "fa2", "dense", "padded", "full"),
        ("sm_80", "serial", "ragged", "padded", "full"),
        ("sm_90a", "pingpong", "padded", "ragged", "window(300, 0)"),
        ("sm_90a", "warp_specialized", "ragged", "dense", "kv_idx <= q_idx or kv_idx < 3"),
    ],
)
def test_the_text_lists_what_the_simulator_lists(
    arch: str, schedule: str, queries: str, keys: str, mask: str, lies: bool
) -> None:
    """The same entries in the same order, for numbers that lie too, and nothing beyond the list is written."""
    listing, draw = Listing(arch, schedule, queries, keys, mask), random.Random(f"{queries} {keys} {lies}")
    plan, longest = listing.plan, 0
    are_many = not lies and "padded" not in (queries, keys)
    for batch in (1, 33, 300 if are_many else 40):
        sizes, lengths = drawn(plan, batch, draw, lies)
        expected = list_tiles(listing.sheet, lengths, sizes)[plan.tile_list]
        count = int(expected[0, 0])
        assert torch.equal(listing.run(sizes, lengths)[: count + 1], expected[: count + 1])
        longest = max(longest, count)
    assert longest >= 10


@pytest.mark.matrix
@pytest.mark.parametrize("lies", [False, True])
@pytest.mark.parametrize("split", ["auto", {"keys": 128}], ids=str)
@pytest.mark.parametrize(
    ("queries", "keys", "mask"),
    [
        ("ragged", "padded", "causal"),
        ("dense", "padded", "window(300, 0)"),
        ("padded", "ragged", "kv_idx <= q_idx or kv_idx < 3"),
        ("dense", "dense", "full"),
    ],
)
def test_the_text_cuts_keys_as_the_simulator_does(
    queries: str, keys: str, mask: str, split: Any, lies: bool
) -> None:
    """Into the same parts, whether a sequence's rows are one tile or more."""
    listing, draw = (
        Listing("sm_90a", "fa2", queries, keys, mask, split),
        random.Random(f"{queries} {keys} {lies}"),
    )
    plan, most = listing.plan, 0
    for batch in (1, 3, 40):
        sizes, lengths = drawn(plan, batch, draw, lies)
        expected = list_tiles(listing.sheet, lengths, sizes)[plan.tile_list]
        count = int(expected[0, 0])
        assert torch.equal(listing.run(sizes, lengths)[: count + 1], expected[: count + 1])
        most = max([most, *expected[1 : count + 1, PART_COUNT].tolist()])
    assert most > 1 or split == "auto" or lies
