import json

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from raymill.actors.gate import GateRules, judge
from raymill.runtime.errors import ContractError
from raymill.runtime.spec import Cost, Monitor

RULES = GateRules(cost=Cost(missed=120, false_alarm=30))


def world(rows: int = 12_000, seed: int = 0):
    """True log-odds, features and outcomes of a small world."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 4))
    logit = x @ [1.0, -0.7, 0.4, 0.0] - 1
    return x, logit, (rng.random(rows) < expit(logit)).astype(np.float32)


def answers(logit, noise: float, seed: int = 9):
    return expit(logit + noise * np.random.default_rng(seed).normal(size=len(logit))).astype(np.float32)


def test_a_better_candidate_is_accepted_with_its_figures():
    _, logit, y = world()
    decision = judge(answers(logit, 0.1), answers(logit, 0.9), answers(logit, 1.1, seed=2), y, RULES)
    assert decision.accept, decision.reason
    assert decision.figures["live"]["log_loss"]["high"] < 0
    assert "12000 rows" in decision.reason and "better than live" in decision.reason
    json.dumps(decision.figures, allow_nan=False)


def test_an_equal_candidate_is_refused():
    _, logit, y = world()
    live = answers(logit, 0.4)
    assert not judge(live, live, answers(logit, 0.8, seed=2), y, RULES).accept


def test_a_candidate_trained_on_shuffled_labels_is_refused():
    x, _, y = world()
    shuffled = np.random.default_rng(1).permutation(y[:6000])
    candidate = LogisticRegression().fit(x[:6000], shuffled).predict_proba(x[6000:])[:, 1].astype(np.float32)
    baseline = LogisticRegression().fit(x[:6000], y[:6000]).predict_proba(x[6000:])[:, 1].astype(np.float32)
    for live in (None, baseline):
        decision = judge(candidate, live, baseline, y[6000:], RULES)
        assert not decision.accept and "not shown to be as good" in decision.reason


def test_while_only_the_baseline_is_live_the_candidate_must_beat_it():
    _, logit, y = world()
    baseline = answers(logit, 0.9)
    assert judge(answers(logit, 0.1), None, baseline, y, RULES).accept
    assert "better than baseline" in judge(baseline, None, baseline, y, RULES).reason
    assert not judge(baseline, None, baseline, y, RULES).accept


def test_a_candidate_that_beats_a_broken_live_version_but_not_the_baseline_is_refused():
    _, logit, y = world()
    decision = judge(answers(logit, 1.0), answers(-logit, 0), answers(logit, 0), y, RULES)
    assert not decision.accept and "baseline" in decision.reason


def test_few_rows_few_positives_and_nonsense_are_no_evidence():
    _, logit, y = world()
    good, bad = answers(logit, 0), answers(logit, 2)
    assert "no evidence: 500 labelled rows" in judge(good[:500], bad[:500], bad[:500], y[:500], RULES).reason
    assert "rarer outcome" in judge(good, bad, bad, np.zeros_like(y), RULES).reason
    broken = good.copy()
    broken[7] = np.nan
    assert "1 of 12000 answers are no probability" in judge(broken, bad, bad, y, RULES).reason


def test_rows_of_one_hour_are_one_piece_of_evidence():
    _, logit, y = world(2_000)
    spread = np.arange(2_000, dtype=np.int64) * 3_600_000_000 // 50
    alone = judge(answers(logit, 0.1), None, answers(logit, 0.9), y, RULES)
    grouped = judge(answers(logit, 0.1), None, answers(logit, 0.9), y, RULES, spread)
    assert alone.figures["baseline"]["money"]["low"] != grouped.figures["baseline"]["money"]["low"]


def test_equal_candidates_that_answer_differently_are_rarely_accepted():
    accepted = 0
    for seed in range(40):
        _, logit, y = world(1_500, seed)
        accepted += judge(answers(logit, 0.5, 10 + seed), None, answers(logit, 0.5, 90 + seed), y, RULES).accept
    assert accepted <= 5


def test_the_same_facts_give_the_same_decision_and_unequal_lengths_are_refused():
    _, logit, y = world(3_000)
    p, q = answers(logit, 0.2), answers(logit, 0.6)
    assert judge(p, q, q, y, RULES) == judge(p, q, q, y, RULES)
    with pytest.raises(ContractError):
        judge(p[:-1], q, q, y, RULES)


def test_the_rules_come_from_the_pipeline_file():
    rules = GateRules.of(Monitor(cost=Cost(missed=2, false_alarm=1), unit="EUR", tolerance=0.1, min_labels=300))
    assert (rules.unit, rules.money_tolerance, rules.min_rows) == ("EUR", 0.1, 300)
