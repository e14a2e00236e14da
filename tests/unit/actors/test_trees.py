"""XGBoost's model files as programs."""

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
