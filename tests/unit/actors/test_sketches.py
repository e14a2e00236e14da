import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from raymill.actors import sketches
from raymill.runtime.errors import ContractError

values = st.one_of(st.floats(-10, 10, width=32), st.sampled_from([0.0, 1.0, float("nan"), float("inf"), float("-inf")]))
tables = hnp.arrays(np.float32, st.tuples(st.integers(1, 40), st.just(3)), elements=values)


@given(tables, tables, tables)
@settings(max_examples=40, deadline=None)
def test_sketches_of_parts_merge_to_the_sketch_of_the_whole(training, first, second):
    reference = sketches.reference(training)
    whole = reference.of(np.vstack([first, second]))
    merged = reference.of(first).merged(reference.of(second))
    assert np.array_equal(whole.counts, merged.counts)
    assert whole.rows == len(first) + len(second)
    assert (whole.counts.sum(axis=1) == whole.rows).all()


@given(tables)
@settings(max_examples=40, deadline=None)
def test_counting_agrees_with_a_search_for_each_value(training):
    sketch = sketches.reference(training)
    for column, edges in enumerate(sketch.edges):
        slow = np.zeros(len(edges) + 2, int)
        for value in training[:, column]:
            slow[-1 if np.isnan(value) else sum(value > e for e in edges)] += 1
        assert sketch.counts[column].tolist() == slow.tolist()


@given(tables)
@settings(max_examples=20, deadline=None)
def test_a_sketch_survives_json_exactly(training):
    sketch = sketches.reference(training)
    back = sketches.Sketch.from_json(json.loads(json.dumps(sketch.to_json(), allow_nan=False)))
    assert np.array_equal(back.edges, sketch.edges, equal_nan=True) and back.edges.dtype == np.float32
    assert np.array_equal(back.counts, sketch.counts)


def test_psi_is_small_for_the_same_distribution_and_large_for_a_shift_a_new_range_or_missing_values():
    rng = np.random.default_rng(1)
    reference = sketches.reference(rng.normal(size=(20_000, 4)).astype(np.float32))
    now = rng.normal(size=(5_000, 4)).astype(np.float32)
    now[:, 1] += 1
    now[:, 2] += 100
    now[rng.random(5_000) < 0.5, 3] = np.nan
    same, shifted, outside, missing = sketches.psi(reference, reference.of(now))
    assert same < 0.02
    assert shifted > 0.25 and outside > 1 and missing > 0.25


def test_no_column_of_thirty_is_called_drifted_without_drift():
    rng = np.random.default_rng(2)
    reference = sketches.reference(rng.normal(size=(20_000, 30)).astype(np.float32))
    worst = [sketches.psi(reference, reference.of(rng.normal(size=(1_000, 30)).astype(np.float32))) for _ in range(30)]
    assert np.max(worst) < 0.1


def test_a_constant_column_that_moves_shows():
    reference = sketches.reference(np.ones((1000, 1), np.float32))
    assert sketches.psi(reference, reference.of(np.ones((500, 1), np.float32)))[0] < 0.01
    for other in (0.0, 2.0):
        assert sketches.psi(reference, reference.of(np.full((500, 1), other, np.float32)))[0] > 1


def test_rows_that_do_not_fit_are_refused():
    reference = sketches.reference(np.ones((10, 2), np.float32))
    with pytest.raises(ContractError):
        reference.of(np.ones((10, 3), np.float32))
    with pytest.raises(ContractError):
        reference.merged(sketches.reference(np.zeros((10, 2), np.float32)))
    with pytest.raises(ContractError):
        sketches.reference(np.empty((0, 2), np.float32))
