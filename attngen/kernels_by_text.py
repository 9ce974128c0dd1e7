"""The kernels of this process by the texts that name them in torch's graphs."""

import hashlib
import json
from typing import Any
from weakref import WeakValueDictionary

from attngen.spec import Spec

LIVE: "WeakValueDictionary[str, Any]" = WeakValueDictionary()
"""Every `attngen.Kernel` that somebody holds, by its text."""


def text_of(spec: Spec, arch: str, name: str, source: str | None) -> str:
    """The canonical text of a kernel: all that it takes to make it again, in another process too.

    Args:
        spec: of the kernel.
        arch: that it was lowered for.
        name: of its entry, which tells kernels apart that one spec may become.
        source: the edited text, if it has one; then no other process can make it.
    """
    made_of = {"arch": arch, "kernel": name, "spec": spec.to_dict()}
    if source is not None:
        made_of["source"] = hashlib.sha256(source.encode()).hexdigest()
    return json.dumps(made_of, sort_keys=True, separators=(",", ":"))
