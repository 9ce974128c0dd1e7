"""What of a spec's declarations has a gradient: numbers that the score reads at one place, each with an owner."""

from collections.abc import Iterator, Sequence

from attngen.expr import SINK, Scalar, TensorType, free_names, gradient_sites, nodes, tensor_names
from attngen.spec.broken import Broken
from attngen.spec.models import INPUTS
from attngen.spec.spec import Spec


def check_declared_gradients(spec: Spec, written: Sequence[str]) -> Iterator[Broken]:
    """Every rule that a name in `gradients` breaks, of a spec that is legal apart from these.

    Args:
        spec: the spec.
        written: its gradients in the order of the text.
    """
    declared: dict[str, Scalar | TensorType] = {**spec.declarations.scalars, **spec.declarations.tensors}
    faults = {name: _fault(spec, declared[name]) for name in spec.gradients if name not in (*INPUTS, SINK)}
    rest = ", ".join(name for name in spec.gradients if not faults.get(name))
    for name, fault in faults.items():
        if fault:
            path = f"gradients[{list(written).index(name)}]"
            yield Broken(path, name, *fault, nearest=(f"gradients: [{rest}]",))


def _fault(spec: Spec, declared: Scalar | TensorType) -> tuple[str, str, str] | None:
    """What a name must be, the rule that says so, and why."""
    name = declared.name
    kind = declared.dtype if isinstance(declared, TensorType) else declared.type
    if kind not in ("f16", "bf16", "f32"):
        must = "must be declared as f16, bf16 or f32"
        return must, "float-gradients", f"`{name}` is {kind}, and has no derivative"
    sites = gradient_sites(spec.score_expr, name, spec.declarations)
    if not sites:
        must = "must be read by the score, other than in conditions and indices"
        if name in tensor_names(spec.score_expr) or any(each.name == name for each in nodes(spec.score_expr)):
            return must, "gradients-of-scores", f"the score moves in steps with `{name}`"
        readers = "the mask alone reads it" if _is_in_mask(spec, name) else "nothing reads it"
        return must, "gradients-of-scores", f"{readers}, so that it has no gradient"
    if len(sites) > 1:
        reads = " and ".join(f"`{site.read}`" for site in sites[:2])
        return "must be read by one lookup of the score", "one-lookup", f"it is read as {reads}"
    if any("score" in free_names(index) for index in sites[0].indices):
        must = "must be read by indices that do not depend on the score"
        return must, "gradient-index", f"it is read as `{sites[0].read}`"
    return None


def _is_in_mask(spec: Spec, name: str) -> bool:
    return any(each.name == name for each in nodes(spec.mask_expr))
