"""Searching for a case that fails, making it small, and telling what was met on the way.

Hypothesis draws and shrinks; a kernel is built once for every spec. With a time limit the search goes on in
rounds, each of its own seed.
"""

import shlex
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import seed as with_seed
from hypothesis import strategies as st
from hypothesis.errors import FlakyFailure
from hypothesis.strategies import SearchStrategy
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from attngen.api import compile, resolve_arch
from attngen.arch import arch_for_capability
from attngen.errors import ArgumentError, AttngenError, ToolchainError
from attngen.fuzz.case import EXAMPLES, Case
from attngen.fuzz.coverage import Coverage, Met, met_by
from attngen.fuzz.properties import RULES, PropertyFailure, check
from attngen.fuzz.properties_of_sequences import dense_spec
from attngen.fuzz.strategies import cases, plan_of, specs
from attngen.fuzz.trial import Make, Subject
from attngen.kernel import Kernel
from attngen.lower import lower
from attngen.plan import KernelPlan
from attngen.runtime import CompilerPool
from attngen.simulate import one_thread
from attngen.spec import Spec, load

CPU_TARGETS = ("simulator", "sm_80", "sm_90a")
"""Whose plans the simulator runs: its own, of any tile, and those whose tiles obey a matrix instruction."""
ARCH_WITHOUT_GPU = "sm_80"
"""Whose plan the simulator runs where a spec's target is `auto`."""
_ROUND = 100
_CASES_PER_KERNEL = 16
"""On a GPU a kernel takes about a second to compile, so that each one meets this many cases."""


@dataclass(frozen=True)
class FuzzReport:
    """How a search ended.

    Attributes:
        ok: nothing failed.
        examples: cases that were drawn, without those of shrinking.
        found_after: cases until the first failure; None where there was none.
        seconds: of the search.
        seed: that gives the same cases again.
        device: where they ran.
        coverage: what they met.
        failure: the failure of the smallest case found, or None.
        flaky: the case failed and then did not: a race, or an uninitialised read.
    """

    ok: bool
    examples: int
    found_after: int | None
    seconds: float
    seed: int
    device: str
    coverage: Coverage
    failure: PropertyFailure | None = None
    flaky: bool = False

    @property
    def repro(self) -> str:
        """The command that tries the failing case again; empty where there is none."""
        if self.failure is None:
            return ""
        return f"attngen fuzz --device {self.device} --repro {shlex.quote(self.failure.case.to_json())}"

    def __str__(self) -> str:
        what = f"{self.examples} cases on {self.device} in {self.seconds:.1f} s, seed {self.seed}"
        if self.failure is None:
            return f"ok: {what}"
        flaky = " (not every time: it is flaky)" if self.flaky else ""
        return f"FAILED after {what}{flaky}\n{self.failure}\n{self.repro}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.coverage.table()
        # The command is to be copied: it is printed as it is, not wrapped and not highlighted.
        yield Text(str(self), style="green" if self.ok else "red", no_wrap=True, overflow="ignore")


@dataclass
class _Search:
    """The state of one search.

    Attributes:
        deadline: after it no case is run, until one has failed.
    """

    make: Make
    device: str
    deadline: float
    progress: Callable[[int], None]
    coverage: Coverage
    found_after: int | None = None
    failure: PropertyFailure | None = None
    flaky: bool = False

    def try_case(self, case: Case) -> None:
        """Run one case that Hypothesis drew."""
        if self.failure is None:
            if time.monotonic() > self.deadline:
                return
            plan = plan_of(case.spec)
            assert plan is not None  # specs without one are not drawn
            self.coverage.add(case, plan)
            self.progress(self.coverage.cases)
        try:
            check(case, self.make, self.device)
        except PropertyFailure as failure:
            if self.failure is None:
                self.found_after = self.coverage.cases
            self.failure = failure  # Hypothesis ends with the smallest one
            raise

    def round(self, drawn: SearchStrategy[Case], seed: int, examples: int) -> None:
        """Draw cases until one fails, and shrink it."""
        once = settings(
            max_examples=examples,
            phases=(Phase.generate, Phase.shrink),
            database=None,
            deadline=None,
            verbosity=Verbosity.quiet,
            report_multiple_bugs=False,
            print_blob=False,
            suppress_health_check=list(HealthCheck),
        )
        try:
            with one_thread():  # what a case is held against is as small
                with_seed(seed)(once(given(drawn)(self.try_case)))()
        except PropertyFailure as failure:
            self.failure = failure
        except FlakyFailure:
            self.flaky = True


def targets_for(device: str, arch: str | None = None) -> tuple[str, ...]:
    """Whose specs are drawn for a device, unless one is named.

    Raises:
        SpecError: no such target.
        ToolchainError: there is no such device.
    """
    if arch is not None:
        return (resolve_arch(load({"problem": {"head_dim": 128}}), arch).name,)
    if device == "cpu":
        return CPU_TARGETS
    if not torch.cuda.is_available():
        raise ToolchainError(f"device {device} is not to be had: torch sees no CUDA GPU", "use --device cpu")
    return (arch_for_capability(torch.cuda.get_device_capability(device)).name,)


def fuzz(
    spec: Spec | None = None,
    *,
    examples: int | None = None,
    minutes: float | None = None,
    device: str = "cpu",
    seed: int = 0,
    targets: Sequence[str] | None = None,
    rules: Sequence[str] = tuple(RULES),
    make: Make | None = None,
    progress: Callable[[int], None] = lambda cases: None,
    meets: Callable[[Case, KernelPlan], Iterable[Met]] = met_by,
    backward: bool = False,
    is_cut: bool = False,
) -> FuzzReport:
    """Look for a case in which a property of attention does not hold.

    Args:
        spec: the only spec to try; drawn anew for every case where None.
        examples: cases to try; 200, or without end where minutes are given.
        minutes: time after which no further case is tried.
        device: "cpu" runs the simulator, "cuda" the cubins.
        seed: of everything that is drawn.
        targets: archs to draw specs for; `targets_for(device)` where None.
        rules: names of the properties to try.
        make: builds what is tried from a spec; the kernel itself where None.
        progress: called with the number of cases so far.
        meets: what of a case is counted.
        backward: whether all specs that are drawn ask for gradients, or one in four.
        is_cut: whether sequences of all specs that are drawn have lengths of their own, or of none.

    Raises:
        ToolchainError: no such device.
        PlanError: the spec has no legal plan.
        ArgumentError: a scalar of the spec has no default.
    """
    started = time.monotonic()
    build = make or kernels()
    if spec is not None:
        stand_in = ARCH_WITHOUT_GPU if device == "cpu" and spec.target == "auto" else None
        spec = spec.replace({"target": resolve_arch(spec, stand_in).name})
        _refuse_without_default(spec)
        build(spec)  # what is wrong with it is the user's to hear, before anything is drawn
        drawn_specs: SearchStrategy[Spec] = st.just(spec)
    else:
        drawn_specs = specs(tuple(targets or targets_for(device)), backward, is_cut)
        if device != "cpu":
            pool = _pool(drawn_specs, seed, (examples or 1024) // _CASES_PER_KERNEL)
            _build_all(build, [*pool, *map(dense_spec, pool)] if is_cut else pool)
            drawn_specs = st.sampled_from(pool)
    limit = examples if examples is not None else EXAMPLES if minutes is None else None
    deadline = started + 60 * minutes if minutes is not None else float("inf")
    search = _Search(build, device, deadline, progress, Coverage(meets))
    drawn, number = cases(drawn_specs, tuple(rules)), 0
    while search.failure is None and time.monotonic() < deadline:
        if limit is not None and number * _ROUND >= limit:
            break
        size = _ROUND if limit is None else min(_ROUND, limit - number * _ROUND)
        search.round(drawn, seed * 1_000_003 + number, size)
        number += 1
    return FuzzReport(
        ok=search.failure is None,
        examples=search.coverage.cases,
        found_after=search.found_after,
        seconds=time.monotonic() - started,
        seed=seed,
        device=device,
        coverage=search.coverage,
        failure=search.failure,
        flaky=search.flaky,
    )


def reproduce(case: Case, device: str = "cpu", make: Make | None = None) -> PropertyFailure | None:
    """Try one case again; its failure, or None.

    Raises:
        AttngenError: its spec has no plan here, or a scalar of it no default; or there is no such property.
    """
    _refuse_without_default(case.spec)
    lower(case.spec, resolve_arch(case.spec))
    if case.rule not in RULES:
        raise ArgumentError("rule", case.rule, f"one of {', '.join(RULES)}")
    try:
        check(case, make or kernels(), device)
    except PropertyFailure as failure:
        return failure
    return None


def kernels() -> Make:
    """Builds kernels, each spec's once."""
    made: dict[Spec, Kernel] = {}

    def make(spec: Spec) -> Subject:
        if spec not in made:
            made[spec] = compile(spec)
        return made[spec]

    return make


def _build_all(build: Make, specs: Iterable[Spec]) -> None:
    """Build what cases will ask for, side by side; what cannot be built fails in a case, which tells of it."""

    def try_to_build(spec: Spec) -> None:
        with suppress(AttngenError):
            build(spec)

    with CompilerPool() as pool:
        pool.each(try_to_build, specs)


def _refuse_without_default(spec: Spec) -> None:
    """A case says nothing of scalars: what they are is for the spec to say."""
    for scalar in spec.declarations.scalars.values():
        if scalar.default is None:
            cure = f"--set 'scalars.{scalar.name}={scalar.type} = VALUE'"
            raise ArgumentError(f"scalars.{scalar.name}", "no default", "one, which every case takes", cure)


def _pool(drawn: SearchStrategy[Spec], seed: int, size: int) -> list[Spec]:
    """Some specs, so that each is compiled once and meets many cases."""
    found: dict[Spec, None] = {}

    @with_seed(seed)
    @settings(
        max_examples=max(8, size),
        phases=(Phase.generate,),
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn)
    def collect(spec: Spec) -> None:
        found[spec] = None

    collect()
    return list(found)
