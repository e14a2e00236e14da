"""Row expressions: one kernel for a row and for many, against a slow reference; Python functions by import path."""

from __future__ import annotations

import math
import random
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymill.actors.evaluate import Evaluator, evaluate
from raymill.actors.feature_plan import FeaturePlan
from raymill.runtime.errors import ContractError, SpecError
from raymill.runtime.expression_json import from_json
from raymill.runtime.expressions import Call, Expr, Python, col, greatest, least, lift, when
from raymill.runtime.row_functions import check_importable, python, resolve
from raymill.runtime.spec import FeatureView
from tests.unit.actors.slow_join import EVENTS, GAP, gap, slow_value

VALUES = [None, 0.0, -0.0, 1.0, -1.0, 0.1, 1 / 3, -2.5, 7.0, 1e6, 1e300, -1e300, 2.0**-21, 5e-324]
ONE = ["abs", "log1p", "sqrt", "floor", "is_null", "not"]
TWO = ["+", "-", "*", "/", ">", ">=", "<", "<=", "==", "!=", "and", "or", "least", "greatest", "fill_null"]


def trees() -> st.SearchStrategy[Expr]:
    leaves = st.one_of(
        st.sampled_from(["x", "y"]).map(col),
        st.sampled_from([0, 1, -2.5, 1e300]).map(lift),
        st.sampled_from([col("tag").eq("a"), col("tag") > "a", col("tag").is_null(), GAP, lift("a").eq("b")]),
    )

    def larger(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
        return st.one_of(
            st.tuples(st.sampled_from(ONE), inner).map(lambda t: Call(t[0], (t[1],))),
            st.tuples(st.sampled_from(TWO), inner, inner).map(
                lambda t: from_json([t[0], t[1].to_json(), t[2].to_json()])
            ),
            st.tuples(inner, inner, inner).map(lambda t: when(*t)),
        )

    return st.recursive(leaves, larger, max_leaves=12)


def some_rows(seed: int, n: int) -> list[dict[str, Any]]:
    dice = random.Random(seed)
    return [
        {"x": dice.choice(VALUES), "y": dice.choice(VALUES), "tag": dice.choice([None, "a", "b"])} for _ in range(n)
    ]


def columns(rows: list[dict[str, Any]]) -> dict[str, Any]:
    numbers = {c: np.array([math.nan if r[c] is None else r[c] for r in rows], dtype=np.float64) for c in "xy"}
    return {**numbers, "tag": pa.array([r["tag"] for r in rows], pa.large_string())}


@settings(max_examples=150, deadline=None)
@given(tree=trees(), seed=st.integers(0, 2**40), n=st.integers(0, 600))
def test_one_row_and_many_rows_have_the_same_values_bit_for_bit_and_those_of_the_slow_reference(
    tree: Expr, seed: int, n: int
) -> None:
    rows = some_rows(seed, n)
    got = evaluate(tree, columns(rows), n)
    for i in random.Random(seed).sample(range(n), min(n, 20)):
        assert evaluate(tree, columns([rows[i]]), 1).tobytes() == got[i : i + 1].tobytes()
        expected = slow_value(tree.to_json(), rows[i])
        if expected is None:
            assert math.isnan(got[i])
        else:
            assert got[i] == expected or math.isclose(got[i], expected, rel_tol=1e-9, abs_tol=1e-12)
        assert got[i] != 0 or math.copysign(1, got[i]) == 1


def test_several_expressions_at_once_are_each_by_itself() -> None:
    trees = (col("x") + 1, col("tag").eq("a"), when(col("y") > 0, col("x"), 3), GAP, col("tag"), lift(2))
    rows = some_rows(3, 700)
    together = Evaluator(trees).values(columns(rows), 700)
    for j, tree in enumerate(trees):
        assert together[:, j].tobytes() == evaluate(tree, columns(rows), 700).tobytes()


def test_log1p_is_exact_to_a_unit_in_the_last_place() -> None:
    dice = np.random.default_rng(0)
    x = np.concatenate(
        [dice.uniform(-1, 1, 20_000), 10 ** dice.uniform(-300, 300, 20_000), -(10 ** dice.uniform(-16, 0, 9_000))]
    )
    got = evaluate(col("x").log1p(), {"x": x}, len(x))
    assert (np.abs(got - np.log1p(x)) <= np.spacing(np.abs(np.log1p(x)))).all()
    edges = evaluate(col("x").log1p(), {"x": np.array([-1.0, -2.0, math.nan, 0.0])}, 4)
    assert np.isnan(edges[:3]).all()
    assert edges[3] == 0


@settings(max_examples=200, deadline=None)
@given(us=st.integers(-(10**16), 10**16))
def test_calendar_parts_are_those_of_the_gregorian_calendar(us: int) -> None:
    moment = np.datetime64(us, "us")
    day = moment.astype("datetime64[D]")
    expected = {
        "hour": us // 3_600_000_000 % 24,
        "weekday": (us // 86_400_000_000 + 3) % 7,
        "month": int(moment.astype("datetime64[M]").astype(int)) % 12 + 1,
        "day_of_year": int((day - day.astype("datetime64[Y]").astype("datetime64[D]")).astype(int)) + 1,
    }
    for name, value in expected.items():
        assert evaluate(getattr(col("t"), name)(), {"t": np.array([float(us)])}, 1)[0] == value


def test_clip_and_one_of_are_what_they_say() -> None:
    x = {"x": np.array([-5.0, 0.5, 9.0, math.nan])}
    np.testing.assert_array_equal(evaluate(col("x").clip(0, 1), x, 4), [0, 0.5, 1, math.nan])
    np.testing.assert_array_equal(evaluate(col("x").one_of(9, 0.5), x, 4), [0, 1, 1, math.nan])
    np.testing.assert_array_equal(evaluate(greatest(least(col("x"), 1), 0), x, 4), evaluate(col("x").clip(0, 1), x, 4))


# -- Python functions --------------------------------------------------------------------------------------------


def raising(x: float | None) -> float:
    return 1 / x if x else 1 / 0


def wordy(x: float | None) -> Any:
    return f"{x}"


def test_python_function_is_named_by_import_path_and_versioned_by_its_source_text() -> None:
    assert isinstance(GAP, Python)
    assert GAP.function == "tests.unit.actors.slow_join:gap"
    assert resolve(GAP.function, GAP.source) is gap
    assert from_json(GAP.to_json()) == GAP
    plan = FeaturePlan.of_views([FeatureView("v", EVENTS, entity="place", features={"f": GAP.mean("5s")})], EVENTS)
    assert plan.functions == (GAP,)
    assert FeaturePlan.from_json(plan.to_json()) == plan
    other = plan.to_json().replace(GAP.source, "0" * 16)
    with pytest.raises(SpecError, match="deploy the same version"):
        FeaturePlan.from_json(other)


@pytest.mark.parametrize("function", [lambda x: x, len, math.sqrt, random.Random().random, str])
def test_what_a_replica_can_not_import_by_name_is_refused_with_the_remedy(function: Any) -> None:
    with pytest.raises(SpecError, match="at the top of a module that is installed"):
        python(function, col("x"))


def test_function_of_a_module_that_only_this_process_finds_is_refused_before_anything_starts() -> None:
    with pytest.raises(SpecError, match=r"replicas can not call .*slow_join"):
        check_importable([GAP])  # `tests` is found from the checkout alone
    installed = python(from_json, col("x"))
    assert isinstance(installed, Python)
    check_importable([installed])
    check_importable([])


def test_function_that_raises_or_gives_no_number_fails_with_its_name_and_arguments() -> None:
    x = {"x": np.array([2.0, 0.0])}
    assert evaluate(python(raising, col("x")), {"x": np.array([2.0])}, 1).tolist() == [0.5]
    with pytest.raises(ContractError, match=re.escape("test_evaluate:raising(0.0,) raised ZeroDivisionError")):
        evaluate(python(raising, col("x")), x, 2)
    with pytest.raises(ContractError, match="return a number or None"):
        evaluate(python(wordy, col("x")), x, 2)
