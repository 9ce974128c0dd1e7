"""Running a call on CPU tensors: what `attngen.runtime.Launcher` does on CUDA ones, by the same methods."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from attngen.bind import (
    Bound,
    Given,
    TableSignature,
    TileTables,
    bind,
    check_arguments,
    check_rows_of_heads,
    made_of,
    passed_as,
    softmax_scale_of,
)
from attngen.errors import ArgumentError
from attngen.plan import Call, KernelPlan, ListTiles
from attngen.simulate.launches import run_call
from attngen.simulate.progress import Progress
from attngen.simulate.tile_lists import list_tiles
from attngen.simulate.traffic import executed_flops
from attngen.simulate.visits import SIMULATED_SMS, Declared, Sizes, declared_values
from attngen.torch_state import torch_defaults

_NOTHING: Mapping[str, Any] = {}


class Simulator:
    """Runs the kernels of a call on CPU tensors, in the caller's thread.

    Args:
        call: the kernels.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.manifest = call.manifest

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        softmax_scale: float | None = None,
        return_lse: bool = False,
        out: torch.Tensor | None = None,
        layout: str = "bshd",
        declared: Mapping[str, Any] = _NOTHING,
        tables: TileTables | None = None,
        intake: str | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Out, and lse if it is asked for; see `attngen.Kernel.__call__` for the arguments."""
        wanted = ("out", "lse") if return_lse else ("out",)
        into = () if out is None else (out,)
        made = self.make(wanted, q, k, v, softmax_scale, into, layout, declared, tables, intake)
        return made[0], (made[1] if return_lse else None)

    def make(
        self,
        wanted: tuple[str, ...],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        softmax_scale: float | None = None,
        into: tuple[torch.Tensor, ...] = (),
        layout: str = "bshd",
        declared: Mapping[str, Any] = _NOTHING,
        tables: TileTables | None = None,
        intake: str | None = None,
        accumulates: bool = False,
        keeps: bool = True,
    ) -> list[torch.Tensor]:
        """Run what the wanted values need, and return these; see `attngen.runtime.Launcher.make` for the arguments."""
        memory = dict(zip(wanted, into, strict=False))
        given = self._check(wanted, q, k, v, softmax_scale, memory, layout, declared, intake)
        kept = dict(self._kept(tables, given)) if tables is not None else {}
        scale = None if softmax_scale is None else softmax_scale_of(softmax_scale)
        bound = bind(self.manifest, given, wanted, SIMULATED_SMS, scale, kept, accumulates)
        if accumulates:  # in memory of its own: what a caller has changes when all is done
            with torch_defaults():
                for name, x in memory.items():
                    kept[name] = x.transpose(1, 2).clone() if layout == "bhsd" else x.clone()
        with Progress(lambda: self._flops(bound)) as progress:
            found = run_call(self.call, bound, kept, layout=layout, memory=progress)
        for name, x in memory.items():
            with torch_defaults(), torch.inference_mode(x.is_inference()):  # where alone it may be written
                found[name] = x.copy_(found[name])
        return [found[name] for name in wanted]

    def bind(self, *call: Any) -> tuple[list[torch.Tensor], Callable[[], None]]:
        """Memory of the wanted values, and what runs the call and leaves them there; arguments as of `make`."""
        made = self.make(*call)

        def start() -> None:
            for own, x in zip(made, self.make(*call), strict=True):
                own.copy_(x)

        return made, start

    def tables(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: str,
        declared: Mapping[str, Any],
        intake: str | None = None,
        out: TileTables | None = None,
    ) -> TileTables:
        """Fill the tables of a call, and nothing else, those of `out` where it is given; see `attngen.Kernel.work`."""
        given = self._check(("out",), q, k, v, None, {}, layout, declared, intake)
        whole = bind(self.manifest, given, ("out",), SIMULATED_SMS)
        prefix = bind(self.manifest, given, tuple(whole.kept.offsets), SIMULATED_SMS)
        made, signature = run_call(self.call, prefix), self._table_signature(given)
        if out is None:
            return TileTables.of(signature, self._made_of(given), made, passed_as(self.manifest))
        out.renew(signature, self._made_of(given))
        for name, x in self._memory_of(out).items():
            x.copy_(made[name])
        return out

    def _check(
        self,
        wanted: tuple[str, ...],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        softmax_scale: float | None,
        into: Mapping[str, torch.Tensor],
        layout: str,
        declared: Mapping[str, Any],
        intake: str | None,
    ) -> Given:
        """Look at everything that a call passes, or at q, k and v where what is wanted is made of nothing else."""
        if all(self.manifest.value_of[name].source == "scratch" for name in wanted):
            return check_rows_of_heads(self.manifest, q, k, v, softmax_scale, into, layout, intake)
        if isinstance(q, torch.Tensor) and q.device.type != "cpu":
            raise ArgumentError("q", f"device {q.device}", "a CUDA or a CPU tensor")
        return check_arguments(self.manifest, q, k, v, softmax_scale, into, layout, declared, intake)

    def _kept(self, tables: TileTables, given: Given) -> Mapping[str, torch.Tensor]:
        """The values of tables that an earlier call has filled."""
        TileTables.check(tables, self._table_signature(given), self._made_of(given))
        return self._memory_of(tables)

    def _memory_of(self, tables: TileTables) -> Mapping[str, torch.Tensor]:
        if isinstance(tables.memory, torch.Tensor):
            raise ArgumentError("tables", "tables of CUDA tensors", "those of a call on the CPU")
        return tables.memory

    def _table_signature(self, given: Given) -> TableSignature:
        kernel = self.call.serving(given.sizes).name
        return TableSignature.of(kernel, given, self.manifest)

    def _made_of(self, given: Given) -> Iterable[torch.Tensor]:
        return made_of(given, self.manifest.lengths).values()

    def _flops(self, bound: Bound) -> int:
        """Those of all that a call launches."""
        sizes, passed = Sizes.of(bound.sizes, Declared()), {**bound.given.scalars, **bound.given.declared}
        plans = (self.call.kernel_of[launch.kernel] for launch in bound.launches)
        flops = 0
        for plan in plans:
            if isinstance(plan, KernelPlan):
                own = replace(sizes, declared=declared_values(plan, sizes, passed))
                if plan.scheduler.is_listed:
                    own = own.with_tensors(list_tiles(ListTiles(plan), bound.given.tensors, own))
                flops += executed_flops(plan, own)
        return flops
