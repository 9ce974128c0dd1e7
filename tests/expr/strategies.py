"""Texts of well-typed masks."""

from hypothesis import strategies as st

NAMES = ("q_idx", "kv_idx", "seqlen_q", "seqlen_k", "h")
SMALL = st.integers(0, 12)
ENV = st.fixed_dictionaries({key: SMALL for key in (*NAMES, "b", "h_kv")})


@st.composite
def sums(draw: st.DrawFn, names: tuple[str, ...] = NAMES) -> str:
    """A sum of names, small integers and multiples, perhaps with a sign before it or a part in brackets."""
    term = st.one_of(
        st.sampled_from(names),
        SMALL.map(str),
        st.builds(lambda factor, key: f"{factor} * {key}", SMALL, st.sampled_from(names)),
        st.builds(lambda key, other: f"({key} - {other})", st.sampled_from(names), st.sampled_from(names)),
    )
    terms = draw(st.lists(term, min_size=1, max_size=4))
    signs = draw(st.lists(st.sampled_from("+-"), min_size=len(terms), max_size=len(terms)))
    lead = "-" if signs[0] == "-" else ""
    return (
        lead + terms[0] + "".join(f" {sign} {term}" for sign, term in zip(signs[1:], terms[1:], strict=True))
    )


_SIGNS = st.sampled_from(["<", "<=", ">", ">=", "==", "!="])
COMPARISONS = st.one_of(
    st.builds(lambda a, sign, b: f"{a} {sign} {b}", sums(), _SIGNS, sums()),
    st.builds(
        lambda a, sign, b, other, c: f"{a} {sign} {b} {other} {c}", sums(), _SIGNS, sums(), _SIGNS, sums()
    ),
)
MASKS = st.recursive(
    COMPARISONS,
    lambda inner: st.one_of(
        st.builds(lambda a, b: f"({a}) and ({b})", inner, inner),
        st.builds(lambda a, b: f"({a}) or ({b})", inner, inner),
        st.builds(lambda a, b: f"{a} or {b}", inner, inner),
        st.builds(lambda a: f"not ({a})", inner),
        st.builds(lambda a, sign, b: f"({a}) {sign} ({b})", inner, st.sampled_from(["==", "!="]), inner),
    ),
    max_leaves=5,
)
