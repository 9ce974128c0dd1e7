"""Terms: what the scores of a tile share, and a kernel looks up once for it."""

from attngen.expr import Expr, free_names, nodes


def score_terms(score: Expr) -> dict[Expr, str]:
    """What a score looks up that is the same for all pairs of a tile, as a field each of the tile's terms.

    A load in the loop would stand between the GEMMs.
    """
    found: dict[Expr, str] = {}
    for each in nodes(score):
        if each.op == "lookup" and not free_names(each) & {"q_idx", "kv_idx", "score"}:
            found[each] = f"term{len(found)}_{each.name}"
    inner = {arg for each in found for arg in nodes(*each.args)}
    return {each: name for each, name in found.items() if each not in inner}
