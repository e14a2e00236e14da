import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from raymill.actors import detectors, scores
from raymill.runtime.spec import Cost

HOUR = detectors.GROUP_US
COST = Cost(missed=120, false_alarm=30)


def test_costs_are_those_of_the_business_and_acting_means_above_the_threshold():
    p = np.array([0.1, 0.2, 0.3, 0.9, np.nan], np.float32)
    y = np.array([1, 1, 0, 1, 1], np.float32)
    assert detectors.costs(p, y, 0.25, COST).tolist() == [120, 120, 30, 0, 120]
    assert detectors.costs(np.array([0.5], np.float32), y[:1], 0.5, COST).tolist() == [120]


@given(st.integers(0, 2**32 - 1), st.integers(2, 200))
@settings(max_examples=30, deadline=None)
def test_auc_and_log_loss_agree_with_scikit_learn(seed, rows):
    rng = np.random.default_rng(seed)
    p = rng.integers(0, 20, rows).astype(np.float32) / 32 + 0.1
    y = rng.integers(0, 2, rows).astype(np.float32)
    y[:2] = [0, 1]
    assert scores.auc(p, y) == pytest.approx(roc_auc_score(y, p))
    assert scores.log_losses(p, y).mean() == pytest.approx(log_loss(y, p.astype(np.float64)), rel=1e-5)


def test_auc_is_unknown_without_both_classes_or_with_answers_that_are_not_finite():
    assert np.isnan(scores.auc(np.array([0.1, 0.2], np.float32), np.ones(2, np.float32)))
    assert np.isnan(scores.auc(np.array([np.nan, 0.2], np.float32), np.array([0, 1], np.float32)))


def test_the_bootstrap_has_the_spread_of_the_mean_and_is_the_same_for_the_same_seed():
    values = np.random.default_rng(3).normal(5, 2, (4000, 2))
    draws = detectors.resampled_means(values, seed=1)
    assert draws.mean(axis=0) == pytest.approx(values.mean(axis=0), abs=0.01)
    assert draws.std(axis=0) == pytest.approx(values.std(axis=0) / 4000**0.5, rel=0.1)
    assert np.array_equal(draws, detectors.resampled_means(values, seed=1))


def test_rows_that_move_together_by_the_hour_are_less_evidence():
    rng = np.random.default_rng(4)
    at = np.repeat(np.arange(100), 50) * HOUR
    values = np.repeat(rng.normal(size=100), 50)[:, None]
    alone = detectors.resampled_means(values).std()
    together = detectors.resampled_means(values, at).std()
    assert together == pytest.approx(values.std() / 10, rel=0.15)
    assert together > 5 * alone


def test_regret_is_against_the_cheapest_alternative_and_its_bound_below_it():
    rng = np.random.default_rng(5)
    live = rng.choice([0.0, 30.0, 120.0], 5000)
    cheaper = np.where(rng.random(5000) < 0.3, 0, live)
    found = detectors.paired_regret(live, {"dear": live + 1, "cheap": cheaper}, np.arange(5000) * HOUR, confidence=0.95)
    assert found.alternative == "cheap" and found.alternative_cost == pytest.approx(cheaper.mean())
    assert found.regret == pytest.approx((live - cheaper).mean())
    assert 0 < found.low < found.regret


def test_without_alternatives_there_is_no_regret():
    found = detectors.paired_regret(np.ones(10), {}, np.zeros(10, np.int64), confidence=0.95)
    assert (found.alternative, found.regret, found.low) == ("", 0.0, 0.0)


def test_equally_good_alternatives_are_called_cheaper_no_more_often_than_the_confidence_allows():
    rng = np.random.default_rng(6)
    at = np.arange(2000) * (HOUR // 20)
    proven = 0
    for trial in range(60):
        live = rng.choice([0.0, 30.0, 120.0], 2000, p=[0.7, 0.2, 0.1])
        others = {f"a{k}": np.where(rng.random(2000) < 0.5, live, rng.permuted(live)) for k in range(5)}
        proven += detectors.paired_regret(live, others, at, confidence=0.95, seed=trial).low > 0
    assert proven <= 8
