"""What a cache in e4m3 rules out beside it, and what its scales may be."""

from collections.abc import Iterator
from typing import Any

from attngen.spec.broken import Broken

CACHE_SCALES = ("per_tensor", "per_head", "per_token", "per_page")
"""What may share a scale of a cache."""
SCHEDULE_OF_CACHES = "fa2"


def check_cache(data: dict[str, Any], said: dict[str, Any]) -> Iterator[Broken]:
    """Every rule that `precision.cache` breaks beside other values.

    Args:
        data: of a spec.
        said: the fields of its `precision`, with defaults.
    """
    inputs, scales = said["inputs"], said["scales"]
    problem, schedule = data.get("problem"), data.get("schedule")
    keys = problem.get("keys", "dense") if isinstance(problem, dict) else "dense"
    kind = schedule.get("kind", "auto") if isinstance(schedule, dict) else "auto"
    if said["cache"] != "e4m3":
        if scales == "per_page" and inputs == "e4m3":
            note = "pages are of caches: precision.cache: e4m3, beside inputs of 16 bits"
            yield _broken("precision.scales", scales, "means nothing to inputs of e4m3", note, "per_token")
        return
    if inputs not in ("f16", "bf16"):
        note = "e4m3 queries have kernels of their own, f32 ones none"
        if inputs == "e4m3":
            note = "where queries are e4m3 so are keys and values: leave precision.cache out"
        yield _broken(
            "precision.inputs", inputs, "must be bf16 or f16 beside a cache of e4m3", note, "bf16", "f16"
        )
        return
    if scales == "per_block":
        note = "a cache grows by keys, and has no blocks"
        yield _broken("precision.scales", scales, "means nothing to a cache", note, "per_head", "per_token")
    if scales == "per_page" and keys != "paged":
        note = "there are pages where problem.keys are paged"
        must = f"must be one of {', '.join(CACHE_SCALES[:-1])} where keys are {keys}"
        yield _broken("precision.scales", scales, must, note, "per_token", "problem.keys: paged")
    if kind not in ("auto", SCHEDULE_OF_CACHES):
        note = "the others multiply K and V as they lie in shared memory"
        must = f"must be {SCHEDULE_OF_CACHES} where the cache is e4m3"
        yield _broken("schedule.kind", kind, must, note, SCHEDULE_OF_CACHES, "precision.cache: auto")
    if data.get("gradients"):
        note = "nothing is trained through a cache"
        names = data["gradients"]
        yield _broken(
            "gradients", names, "must be [] where the cache is e4m3", note, "[]", "precision.cache: auto"
        )


def _broken(path: str, value: object, must: str, note: str, *nearest: str) -> Broken:
    return Broken(path, value, must, "e4m3-cache", note, nearest)
