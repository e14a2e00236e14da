"""XGBoost's model files as programs."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from raymill.actors import surroundings
from raymill.runtime.errors import ModelError

xgboost = pytest.importorskip("xgboost")


@pytest.fixture(scope="module")
def fitted():
    x = np.random.default_rng(0).normal(size=(400, 3)).astype(np.float32)
    settings = {"objective": "binary:logistic", "nthread": 1}
    return x, xgboost.train(settings, xgboost.DMatrix(x, x[:, 0] + x[:, 1] > 0), 5)


@pytest.mark.parametrize("form", ["ubj", "json"])
def test_a_model_file_answers_as_the_library_does(fitted, form):
    x, booster = fitted
    x = x.copy()
    x[::7, 1] = np.nan
    program = surroundings.load_program(bytes(booster.save_raw(form)))
    assert np.array_equal(program(x), booster.predict(xgboost.DMatrix(x)))
    assert program(x[:0]).shape == (0,)


def test_what_is_no_such_model_is_refused(fitted):
    with pytest.raises(ModelError, match="no model of XGBoost"):
        surroundings.load_program(b"{damaged")
    with pytest.raises(ModelError, match=r"take \[rows, 3\]"):
        surroundings.load_program(bytes(fitted[1].save_raw("ubj")))(np.zeros((2, 4), np.float32))


def test_several_numbers_a_row_are_refused_and_any_memory_layout_is_read(fitted):
    x, booster = fitted
    program = surroundings.load_program(bytes(booster.save_raw("ubj")))
    assert np.array_equal(program(np.asfortranarray(x[::3])), booster.inplace_predict(x[::3]))
    settings = {"objective": "multi:softprob", "num_class": 3, "nthread": 1}
    several = xgboost.train(settings, xgboost.DMatrix(x, np.arange(len(x)) % 3), 2)
    with pytest.raises(ModelError, match="3 numbers a row"):
        surroundings.load_program(bytes(several.save_raw("ubj")))(x)


def test_threads_get_the_answers_of_their_own_rows(fitted):
    x, booster = fitted
    program, wanted = surroundings.load_program(bytes(booster.save_raw("ubj"))), booster.inplace_predict(x)

    def ask(i):
        part = slice(i % 300, i % 300 + 1 + i % 90)
        return np.array_equal(program(x[part]), wanted[part])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(2000)))
