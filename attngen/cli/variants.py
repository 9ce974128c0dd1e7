"""Which kernels a command is about: its specs, times every combination of what `--set` sweeps."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any, TypeVar

import click

from attngen.api import resolve_arch
from attngen.arch import Arch
from attngen.errors import SpecError, ToolchainError
from attngen.kernel import Kernel
from attngen.lower import lower
from attngen.resources import specs_dir
from attngen.runtime import CompilerPool
from attngen.spec import Spec, load

Command = TypeVar("Command", bound=Callable[..., Any])
Sweep = Mapping[str, tuple[Any, ...]]

_INTEGER = re.compile(r"[-+]?[0-9]{1,1000}")  # Python converts no longer one without being asked
_TRUTH = {"true": True, "false": False}

ARCH_WITHOUT_GPU = "sm_80"
"""What stands for the target `auto` where no kernel shall run on a GPU: the oldest, which all others outdo."""


@dataclass(frozen=True)
class Variant:
    """One spec with one value for every swept key, or the reason why there is none.

    Attributes:
        source: the spec as the user named it.
        changes: the swept keys and their values.
        found: the spec, or why it was refused.
    """

    source: str
    changes: Mapping[str, Any]
    found: Spec | SpecError

    @property
    def spec(self) -> Spec:
        """The spec.

        Raises:
            SpecError: it was refused.
        """
        if isinstance(self.found, SpecError):
            raise self.found
        return self.found

    @property
    def label(self) -> str:
        """What tells this variant from the others."""
        name = (self.found.name if isinstance(self.found, Spec) else "") or self.source
        return " ".join([name, *(f"{key}={_text(value)}" for key, value in self.changes.items())])


def specs_argument(command: Command) -> Command:
    """`SPEC...` and `--set`."""
    sets = click.option(
        "--set",
        "sweep",
        metavar="KEY=V1,V2",
        multiple=True,
        callback=_read_sweep,
        help="Give a key of the spec another value, or sweep several; repeat it for every combination.",
    )
    specs = click.argument("specs", metavar="SPEC...", nargs=-1, required=True)
    return specs(sets(command))


arch_option = click.option("--arch", help="Build for this target instead of the spec's.")


def variants(sources: Iterable[str], sweep: Sweep) -> Iterator[Variant]:
    """Every spec under every combination of swept values. A spec that cannot be read at all is one variant.

    Args:
        sources: of specs, or folders of them: paths, or names of shipped ones.
        sweep: values by path of the spec.
    """
    for source in chain.from_iterable(map(_in_folder, sources)):
        try:
            spec = load(source)
        except SpecError as fault:
            yield Variant(source, {}, fault)
            continue
        for values in product(*sweep.values()):
            changes = dict(zip(sweep, values, strict=True))
            try:
                yield Variant(source, changes, spec.replace(changes) if changes else spec)
            except SpecError as fault:
                yield Variant(source, changes, fault)


def _in_folder(source: str) -> Iterator[str]:
    """The specs of a folder, sorted, or the source itself where it is no folder."""
    folders = [folder for folder in (Path(source), specs_dir() / source) if os.path.isdir(folder)]
    yield from sorted(map(str, folders[0].glob("*.yaml"))) if folders else (source,)


def arch_without_gpu(spec: Spec, arch: str | None) -> Arch:
    """The arch for work that needs no GPU: as given, as the spec's target, or `ARCH_WITHOUT_GPU` for `auto`."""
    return resolve_arch(spec, arch if arch is not None or spec.target != "auto" else ARCH_WITHOUT_GPU)


def stand_in_note(spec: Spec, arch: str | None) -> str | None:
    """What to tell the user where `arch_without_gpu` chose for them."""
    if arch or spec.target != "auto":
        return None
    return f"target is auto; lowered for {ARCH_WITHOUT_GPU} (choose with --arch)"


def kernel_of(spec: Spec, arch: Arch, *, lineinfo: bool = False) -> Kernel:
    """The kernel, not compiled yet.

    Raises:
        PlanError: no legal plan.
    """
    return Kernel(spec, lower(spec, arch), lineinfo)


def compile_all(kernels: Iterable[Kernel]) -> dict[Kernel, ToolchainError | None]:
    """Compile kernels in parallel, those of targets that emit nothing left out; a missing compiler is an answer."""

    def attempt(kernel: Kernel) -> ToolchainError | None:
        try:
            kernel.compile()
        except ToolchainError as error:
            return error
        return None

    wanted = [kernel for kernel in kernels if kernel.plan.arch.emits]
    with CompilerPool(max_workers=os.cpu_count() or 1) as pool:
        return dict(zip(wanted, pool.each(attempt, wanted), strict=True))


def _read_sweep(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> Sweep:
    """`tile.block_n=64,128` as a key and its values."""
    sweep: dict[str, tuple[Any, ...]] = {}
    for text in given:
        key, equals, values = text.partition("=")
        key = key.strip()
        if not key or not equals or not values.strip():
            raise click.BadParameter(
                f"{text!r} is not KEY=VALUE or KEY=V1,V2: --set tile.block_n=32,64", ctx, param
            )
        if key in sweep:
            raise click.BadParameter(f"{key} is given twice: --set {key}=V1,V2 sweeps it", ctx, param)
        sweep[key] = tuple(read_value(part) for part in _split(values))
    return sweep


def _split(values: str) -> list[str]:
    """Cut at commas, but not inside brackets: a call in an expression has commas of its own."""
    parts, depth = [""], 0
    for char in values:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def read_value(text: str) -> Any:
    """A number, a truth value or a list in brackets where the text is one; the spec's schema judges the rest."""
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        return [read_value(part) for part in _split(text[1:-1]) if part.strip()]
    return int(text) if _INTEGER.fullmatch(text) else _TRUTH.get(text, text)


def _text(value: Any) -> str:
    """The value as `read_value` reads it."""
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
