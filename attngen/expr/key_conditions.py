"""What a mask asks of a key alone, whatever the query: padding, lengths, every third key."""

from attngen.expr.logic import conjunction, disjunction
from attngen.expr.tree import TRUE, Expr, free_names, nodes


def shown_keys(mask: Expr) -> Expr | None:
    """A condition on the key that holds wherever the mask shows it to some query; None where the mask has none.

    It is the mask with TRUE in the place of each comparison that reads the query; of `causal and pad[b, kv_idx]` it is
    `pad[b, kv_idx]`. Keys for which it does not hold are hidden from every query of a head.
    """
    found: dict[Expr, Expr] = {}
    for each in nodes(mask, below=("and", "or")):
        if "q_idx" not in free_names(each):
            found[each] = each
        elif each.op in ("and", "or"):
            parts = [found[part] for part in each.args]
            found[each] = conjunction(parts) if each.op == "and" else disjunction(parts)
        else:
            found[each] = TRUE
    return found[mask] if "kv_idx" in free_names(found[mask]) else None
