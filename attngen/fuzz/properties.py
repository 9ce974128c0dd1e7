"""Which properties of attention hold for which specs, and the check of a case.

The error bound is checked in every case, that of gradients where there are some; of the others each case draws one that
its mask allows. Two runs that must do the same arithmetic are compared bit by bit; runs that sum in another order are
each held to the bound.
Source: docs/design/check.md.
"""

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Literal

from attngen.errors import AttngenError
from attngen.expr import TRUE, free_names, shown_keys
from attngen.fuzz import properties_of_gradients as of_gradients
from attngen.fuzz import properties_of_outputs as of_outputs
from attngen.fuzz import properties_of_sequences as of_sequences
from attngen.fuzz.case import Case
from attngen.fuzz.trial import Complaint, Make, Trial
from attngen.memory import is_out_of_memory
from attngen.plan import KernelPlan
from attngen.spec import Spec


class PropertyFailure(AttngenError):
    """A property does not hold.

    Attributes:
        case: where.
        rule: which property; "error" is the bound itself, "crash" an exception.
        complaint: what was seen.
    """

    def __init__(self, case: Case, rule: str, complaint: str) -> None:
        super().__init__(f"{rule}: {complaint}")
        self.case = case
        self.rule = rule
        self.complaint = complaint


@dataclass(frozen=True)
class Rule:
    """A property and where it holds.

    Attributes:
        check: the property; its docstring says what it claims.
        applies: whether it holds for a plan whose mask and score use such names.
        is_rare: few masks allow it; where one does, it is drawn four times as often.
        of_gradients: it holds for specs that ask for gradients.
        lengths: whether it holds for specs of dense sequences, of others, or of both.
        of_caches: it holds for caches of e4m3 too, whose descales no property cuts or repeats.
        in_one_order: of gradients only where their sums have one order, since it compares bits of two runs.
    """

    check: Callable[[Trial], Complaint]
    applies: Callable[[KernelPlan, Set[str]], bool] = lambda plan, names: True
    is_rare: bool = False
    of_gradients: bool = False
    lengths: Literal["dense", "own", "any"] = "dense"
    of_caches: bool = False
    in_one_order: bool = False

    def may_hold(self, spec: Spec, plan: KernelPlan) -> bool:
        """Whether it holds for a spec and its plan."""
        kind = "dense" if plan.lengths.are_dense else "own"
        if plan.descales and not self.of_caches:
            return False
        if self.lengths not in (kind, "any") or (self.of_gradients and not spec.gradients):
            return False
        if self.in_one_order and spec.gradients and not spec.deterministic:
            return False
        return self.applies(plan, names_of(plan))


def names_of(plan: KernelPlan) -> Set[str]:
    """What mask and score read, and the sizes that declared tensors have."""
    sizes = (dim for tensor in plan.declarations.tensors.values() for dim in tensor.dims)
    return {*free_names(plan.mask), *free_names(plan.score), *map(str, sizes)}


def _cuts_by_sequence(plan: KernelPlan, names: Set[str]) -> bool:
    """Whether where its keys are cut hangs on a sequence alone; else parts are as long as all others make them."""
    return plan.split is None or plan.split.keys is not None


def _scales_span(plan: KernelPlan, *kinds: str) -> bool:
    """Whether scales are of one of these kinds; those of 16-bit inputs, none, are of all."""
    return plan.quantizer is None or plan.quantizer.scales in kinds


def _is_plain(plan: KernelPlan, names: Set[str]) -> bool:
    """Whether every query sees every key, by its plain score."""
    return plan.mask is TRUE and not plan.has_score


# With e4m3 inputs both runs must have the same operands, or a reference of their own: not where a scale of the whole
# batch is that of a slice, where a group of heads of Q shares one, where keys change their block of V, or where parts
# of the keys or a large column have scales that the whole has not.
RULES: dict[str, Rule] = {
    "error": Rule(of_outputs.error, lengths="any", of_caches=True),
    "repeat": Rule(of_outputs.repeat, lengths="any", of_caches=True),
    "surroundings": Rule(of_outputs.surroundings, lengths="any", of_caches=True),
    "hidden-keys": Rule(
        of_outputs.hidden_keys,
        lambda plan, names: shown_keys(plan.mask) is not None and not plan.scales,
        is_rare=True,
        in_one_order=True,
    ),
    "batch-slice": Rule(
        of_outputs.batch_slice,
        lambda plan, names: (
            names.isdisjoint(("b", "batch")) and _scales_span(plan, "per_head", "per_block", "per_token")
        ),
    ),
    "repeated-heads": Rule(
        of_outputs.repeated_heads,
        lambda plan, names: (
            names.isdisjoint(("h_kv", "num_heads_kv"))
            and _scales_span(plan, "per_tensor", "per_block", "per_token")
        ),
    ),
    "shifted-scores": Rule(
        of_outputs.shifted_scores, lambda plan, names: not (plan.has_score or plan.has_sink or plan.scales)
    ),
    "permuted-keys": Rule(
        of_outputs.permuted_keys,
        lambda plan, names: _is_plain(plan, names) and _scales_span(plan, "per_tensor", "per_head"),
        is_rare=True,
    ),
    "split-keys": Rule(
        of_outputs.split_keys,
        lambda plan, names: _is_plain(plan, names) and not (plan.has_sink or plan.scales),
        is_rare=True,
    ),
    "wide-window": Rule(of_outputs.wide_window, _is_plain, is_rare=True),
    "sequences": Rule(of_sequences.sequences, _cuts_by_sequence, is_rare=True, lengths="own"),
    "gradients": Rule(of_gradients.gradients, of_gradients=True, lengths="any"),
    "repeated-gradients": Rule(
        of_gradients.repeated_gradients, of_gradients=True, lengths="any", in_one_order=True
    ),
    "sequence-gradients": Rule(
        of_sequences.sequence_gradients, is_rare=True, of_gradients=True, lengths="own", in_one_order=True
    ),
    # What is smaller than f16's normal numbers has fewer bits, and what is larger than all of them none.
    "scaled-gradients": Rule(
        of_gradients.scaled_gradients,
        lambda plan, names: plan.inputs.name != "f16",
        of_gradients=True,
        lengths="any",
        in_one_order=True,
    ),
    "sliced-gradients": Rule(
        of_gradients.sliced_gradients,
        lambda plan, names: names.isdisjoint(("b", "batch")),
        of_gradients=True,
        in_one_order=True,
    ),
}


def check(case: Case, make: Make, device: str = "cpu") -> None:
    """Run a case.

    Raises:
        PropertyFailure: the bound or the case's property does not hold, or something was raised.
    """
    rule, complaint = _complaint(case, make, device)
    if complaint is not None:  # the one place that raises, so that Hypothesis shrinks all failures as one
        raise PropertyFailure(case, rule, complaint)


def _complaint(case: Case, make: Make, device: str) -> tuple[str, Complaint]:
    try:
        trial = Trial(case, make, device)
        always = ("error", "gradients") if case.spec.gradients else ("error",)
        for name in dict.fromkeys((*always, case.rule)):
            if (complaint := RULES[name].check(trial)) is not None:
                return name, complaint
    except Exception as raised:  # whatever a legal call raises is a finding, but for this machine's size
        if is_out_of_memory(raised):
            raise
        return "crash", f"{type(raised).__name__}: {raised}"
    return "", None
