import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymill.runtime.errors import SpecError
from raymill.runtime.expression_json import from_json
from raymill.runtime.expressions import CalendarPart, Window, col, digest, duration_us


def trees() -> st.SearchStrategy:
    rows = st.recursive(
        st.sampled_from(["a", "b"]).map(col),
        lambda inner: st.one_of(
            st.tuples(inner, inner).map(lambda two: two[0] + two[1]),
            st.tuples(inner, st.integers(-5, 5)).map(lambda two: two[0] > two[1]),
            inner.map(lambda one: (one * 2) & one.eq("x")),
        ),
        max_leaves=6,
    )
    return st.one_of(
        rows, rows.map(lambda r: r.mean("6h") - r.count("7d")), rows.map(lambda r: CalendarPart("hour", r))
    )


@given(trees())
def test_a_tree_survives_json_and_keeps_its_hash(tree):
    again = from_json(tree.to_json())
    assert again == tree
    assert digest(again.to_json()) == digest(tree.to_json())


def test_trees_that_differ_have_different_hashes():
    seen = {
        digest(e.to_json()) for e in (col("a").mean("6h"), col("a").mean("7h"), col("b").mean("6h"), col("a").sum("6h"))
    }
    assert len(seen) == 4


def test_columns_and_windows_are_listed_once_in_order():
    expr = (col("b") - col("a")).mean("1d") + (col("b") - col("a")).mean("1d") + col("c").last("1h")
    assert expr.columns() == ("b", "a", "c")
    assert expr.windows() == (
        Window("mean", col("b") - col("a"), 86_400_000_000),
        Window("last", col("c"), 3_600_000_000),
    )


@pytest.mark.parametrize(
    ("text", "us"), [("50ms", 50_000), ("3h", 10_800_000_000), ("1.5s", 1_500_000), ("7d", 604_800_000_000)]
)
def test_durations_are_microseconds(text, us):
    assert duration_us(text) == us


@pytest.mark.parametrize("text", ["", "3", "h", "3 hours", "-3h", "3w"])
def test_what_is_no_duration_is_refused_with_the_form(text):
    with pytest.raises(SpecError, match="write a number and a unit"):
        duration_us(text)


def test_a_window_inside_a_window_is_refused():
    with pytest.raises(SpecError, match="window inside a window"):
        col("a").mean("1h").sum("2h")


def test_what_can_not_stand_in_an_expression_is_refused():
    with pytest.raises(SpecError, match="can not stand"):
        col("a") + object()
    with pytest.raises(SpecError, match="no node"):
        from_json(["exec", "rm"])
