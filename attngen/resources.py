"""Where the files that are data live: templates and shipped specs.

In a checkout (and an editable install) they stand beside the package, in a wheel inside it. This module is the
only place that knows; it reads no file.
"""

from pathlib import Path

from attngen.errors import InternalError

_PACKAGE = Path(__file__).resolve().parent


def data_dir(name: str) -> Path:
    """The folder `name` ("templates" or "specs"), in the package or else in its parent.

    Raises:
        InternalError: the installation carries neither.
    """
    for root in (_PACKAGE, _PACKAGE.parent):
        if (root / name).is_dir():
            return root / name
    raise InternalError(f"the installation at {_PACKAGE} carries no folder {name!r}")


def templates_dir() -> Path:
    """The Jinja templates and device code."""
    return data_dir("templates")


def specs_dir() -> Path:
    """The shipped specs."""
    return data_dir("specs")


def spec_path(name: str) -> Path | None:
    """The shipped spec called `name` (`h100_fp8`, or `ablation/pingpong`), or None."""
    path = specs_dir() / f"{name}.yaml"
    return path if path.is_file() else None


def shipped_specs() -> tuple[Path, ...]:
    """Every shipped spec, sorted by path."""
    return tuple(sorted(specs_dir().rglob("*.yaml")))


def shipped_names() -> tuple[str, ...]:
    """What `spec_path` takes, sorted."""
    return tuple(path.relative_to(specs_dir()).with_suffix("").as_posix() for path in shipped_specs())
