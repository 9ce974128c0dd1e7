"""The manifest: what a program must know to launch an emitted kernel, in any language.

It stands beside the .cu as .json. The Python runtime launches from it and from nothing else.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

from attngen.plan import Formula, Param, Plan

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class KernelEntry:
    """A kernel: its C symbol, its block, and the fields of the one struct it takes by value.

    The fields stand in the order given, each aligned to its size: pointer and i64 to 8 bytes, i32 and f32 to 4.
    """

    name: str
    threads: int
    smem_bytes: int
    params: tuple[Param, ...]


@dataclass(frozen=True)
class WorkspaceEntry:
    """Device memory that every call needs, dense and uninitialised."""

    name: str
    dtype: str
    shape: tuple[Formula, ...]


@dataclass(frozen=True)
class LaunchEntry:
    """One launch, in order, on a one-dimensional grid."""

    kernel: str
    grid: Formula


@dataclass(frozen=True)
class Manifest:
    """Everything a launch needs. Formulas are over `attngen.plan.RUNTIME_SIZES`."""

    name: str
    arch: str
    direction: str
    head_dim_qk: int
    head_dim_v: int
    inputs: str
    output: str
    mask: str
    schedule: str
    spec_digest: str
    kernels: tuple[KernelEntry, ...]
    workspaces: tuple[WorkspaceEntry, ...]
    launches: tuple[LaunchEntry, ...]
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """The manifest as text; the same plan gives the same bytes."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Read what `to_json` wrote.

        Raises:
            ValueError: the text is of another schema version.
        """
        data: dict[str, Any] = json.loads(text)
        if data.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"manifest schema_version is {data.get('schema_version')!r}, this attngen reads {SCHEMA_VERSION}"
            )
        kernels = tuple(
            KernelEntry(k["name"], k["threads"], k["smem_bytes"], tuple(Param(**p) for p in k["params"]))
            for k in data.pop("kernels")
        )
        workspaces = tuple(
            WorkspaceEntry(w["name"], w["dtype"], tuple(w["shape"])) for w in data.pop("workspaces")
        )
        launches = tuple(LaunchEntry(**launch) for launch in data.pop("launches"))
        return cls(kernels=kernels, workspaces=workspaces, launches=launches, **data)


def manifest(plan: Plan) -> Manifest:
    """The manifest of a plan."""
    return Manifest(
        name=plan.name,
        arch=plan.arch.name,
        direction="forward",
        head_dim_qk=plan.head_dim_qk,
        head_dim_v=plan.head_dim_v,
        inputs=plan.inputs.name,
        output=plan.output.name,
        mask=plan.mask_text,
        schedule=plan.schedule,
        spec_digest=plan.spec_digest,
        kernels=tuple(KernelEntry(k.name, k.threads, k.smem_bytes, k.params) for k in plan.kernels),
        workspaces=tuple(WorkspaceEntry(w.name, "f32", w.shape) for w in plan.workspaces),
        launches=tuple(LaunchEntry(launch.kernel, launch.grid) for launch in plan.launches),
    )
