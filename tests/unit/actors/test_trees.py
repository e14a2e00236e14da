"""XGBoost's model files as programs."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymill.actors import surroundings, tree_walk
from raymill.runtime.errors import ModelError

xgboost = pytest.importorskip("xgboost")


@pytest.fixture(scope="module")
def fitted():
    x = np.random.default_rng(0).normal(size=(400, 3)).astype(np.float32)
    wanted = {"objective": "binary:logistic", "nthread": 1}
    return x, xgboost.train(wanted, xgboost.DMatrix(x, x[:, 0] + x[:, 1] > 0), 5)


@pytest.mark.parametrize("form", ["ubj", "json"])
def test_a_model_file_answers_as_the_library_does(fitted, form):
    x, booster = fitted
    x = x.copy()
    x[::7, 1] = np.nan
    program = surroundings.load_program(bytes(booster.save_raw(form)))
    assert np.array_equal(program(x), booster.predict(xgboost.DMatrix(x)))
    assert program(x[:0]).shape == (0,)


def test_what_is_no_such_model_is_refused(fitted):
    whole = bytes(fitted[1].save_raw("ubj"))
    for damaged in (b"{damaged", b'{"a":1}', whole[: len(whole) // 2]):
        with pytest.raises(ModelError, match="no model of XGBoost") as told:
            surroundings.load_program(damaged)
        assert "\n" not in told.value.message and "/workspace" not in told.value.message
    linear = {"objective": "reg:squarederror", "booster": "gblinear", "nthread": 1}
    other = xgboost.train(linear, xgboost.DMatrix(fitted[0], fitted[0][:, 0]), 2)
    with pytest.raises(ModelError, match=r"Inplace predict is not supported.*: trees are served"):
        surroundings.load_program(bytes(other.save_raw("ubj")))(fitted[0])
    with pytest.raises(ModelError, match=r"take \[rows, 3\]"):
        surroundings.load_program(bytes(fitted[1].save_raw("ubj")))(np.zeros((2, 4), np.float32))


def test_several_classes_are_answered_as_by_the_library_and_any_memory_layout_is_read(fitted):
    x, booster = fitted
    program = surroundings.load_program(bytes(booster.save_raw("ubj")))
    assert np.array_equal(program(np.asfortranarray(x[::3])), booster.inplace_predict(x[::3]))
    wanted = {"objective": "multi:softprob", "num_class": 3, "nthread": 1}
    several = xgboost.train(wanted, xgboost.DMatrix(x, np.arange(len(x)) % 3), 2)
    answers = surroundings.load_program(bytes(several.save_raw("ubj")))
    for rows in (1, len(x)):
        assert np.array_equal(answers(x[:rows]), several.inplace_predict(x[:rows]))


def test_threads_get_the_answers_of_their_own_rows(fitted):
    x, booster = fitted
    program, wanted = surroundings.load_program(bytes(booster.save_raw("ubj"))), booster.inplace_predict(x)

    def ask(i):
        part = slice(i % 300, i % 300 + 1 + i % 90)
        return np.array_equal(program(x[part]), wanted[part])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(2000)))


def _data(rows=300, columns=4):
    random = np.random.default_rng(3)
    x = np.round(random.normal(size=(rows, columns)), 1).astype(np.float32)
    x[random.random(x.shape) < 0.1] = np.nan
    return x, np.nan_to_num(x[:, 0]) * np.nan_to_num(x[:, 1]) + x[:, 2] > 0.1


def _bits(p):
    return p.view(np.uint32).tolist()


@settings(max_examples=25, deadline=None)
@given(
    trees=st.integers(1, 11),
    depth=st.integers(1, 9),
    objective=st.sampled_from(["binary:logistic", "reg:squarederror"]),
    leafwise=st.booleans(),
    start=st.sampled_from([None, 0.013, 0.5, 0.97]),
    seed=st.integers(0, 99),
)
def test_few_rows_are_answered_to_the_last_bit_as_by_the_library(trees, depth, objective, leafwise, start, seed):
    x, y = _data()
    wanted = {"objective": objective, "max_depth": depth, "nthread": 1, "seed": seed, "subsample": 0.7}
    wanted |= {"grow_policy": "lossguide", "max_leaves": 20} if leafwise else {}
    wanted |= {} if start is None else {"base_score": start}
    booster = xgboost.train(wanted, xgboost.DMatrix(x, y), trees)
    walk = tree_walk.walk_of(booster, booster.inplace_predict)
    assert walk is not None
    asked = np.random.default_rng(seed).normal(size=(64, 4)).astype(np.float32) * 3
    asked[::5] = x[: len(asked[::5])]
    asked[1] = [np.inf, -np.inf, np.nan, 3e38]
    wanted_bits = _bits(booster.inplace_predict(asked))
    assert [_bits(walk(asked[i : i + 1]))[0] for i in range(64)] == wanted_bits == _bits(walk(asked))


@pytest.mark.parametrize(
    "wanted",
    [
        {"booster": "dart", "rate_drop": 0.5},
        {"objective": "reg:gamma"},
        {"max_depth": 0, "max_leaves": 60, "grow_policy": "lossguide", "min_child_weight": 0, "gamma": 0},
    ],
)
def test_what_is_no_plain_sum_of_trees_is_left_to_the_library_or_answered_as_by_it(wanted):
    x, y = _data()
    booster = xgboost.train({"nthread": 1, **wanted}, xgboost.DMatrix(x, y + 1.0 if "gamma" in str(wanted) else y), 6)
    walk = tree_walk.walk_of(booster, booster.inplace_predict)
    assert (walk is None) == ("max_leaves" not in wanted)
    program = surroundings.load_program(bytes(booster.save_raw("ubj")))
    assert _bits(program(x[:5])) == _bits(booster.inplace_predict(x[:5]))


def test_a_walk_that_differs_from_the_library_by_a_bit_is_not_used():
    x, y = _data()
    booster = xgboost.train({"nthread": 1, "objective": "binary:logistic"}, xgboost.DMatrix(x, y), 3)
    assert tree_walk.walk_of(booster, booster.inplace_predict) is not None
    assert tree_walk.walk_of(booster, lambda x: np.nextafter(booster.inplace_predict(x), np.float32(1))) is None
