import io
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import log_loss as their_log_loss
from sklearn.metrics import roc_auc_score

from raymill.actors.program import (
    Logits,
    Prepare,
    baseline,
    build_net,
    export_program,
    load_program,
    measure,
)
from raymill.actors.scores import auc, log_loss
from raymill.actors.training_data import columns_of
from raymill.runtime.errors import ContractError, ModelError, SpecError, TrainingError
from raymill.runtime.messages import Manifest, TrainingSet

NAN = np.nan
MANIFEST = Manifest(
    pipeline="p",
    lake_versions={},
    features=(),
    feature_hashes={},
    label="late",
    label_rule=[],
    start_at=0,
    end_at=1,
    known_until=1,
    rows=0,
    without_label=0,
)


class Net(torch.nn.Module):
    """A class that whoever loads the program does not have."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(inputs, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).squeeze(-1)


def some_rows(rows: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(3, 5, size=(rows, 4)).astype(np.float32)
    x[::7, 1] = NAN
    return x


@pytest.fixture(scope="module")
def program() -> bytes:
    torch.manual_seed(0)
    stats = measure(some_rows(1000))
    return export_program(Logits(stats, build_net(Net, stats.inputs)), 4)


def test_rows_are_standardised_and_the_unknown_is_zero_and_flagged() -> None:
    stats = measure(np.array([[1, 5, NAN], [3, 5, NAN], [5, 5, 2]], np.float32))
    assert stats.mean == (3.0, 5.0, 2.0) and stats.std[1:] == (1.0, 1.0) and stats.sometimes_missing == (2,)
    prepared = Prepare(stats)(torch.tensor([[3.0, NAN, NAN], [3.0, 6.0, 3.0], [torch.inf, 1e38, -1e38]])).numpy()
    assert prepared.tolist() == [[0, 0, 0, 1], [0, 1, 1, 0], [0, 10, -10, 0]]


def test_columns_that_never_vary_or_never_come_do_no_harm() -> None:
    stats = measure(np.full((5, 2), NAN, np.float32))
    assert stats.mean == (0.0, 0.0) and stats.std == (1.0, 1.0) and stats.inputs == 4


def test_a_row_alone_is_answered_as_in_any_batch(program: bytes) -> None:
    predict = load_program(program)
    x = some_rows(257, 5)
    together = predict(x)
    assert together.shape == (257,) and together.dtype == np.float32
    assert np.abs(np.concatenate([predict(x[i : i + 1]) for i in range(257)]) - together).max() < 1e-6
    assert np.abs(np.concatenate([predict(part) for part in np.array_split(x, 9)]) - together).max() < 1e-6
    assert predict(x[:0]).shape == (0,)


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.just(4)), elements=st.floats(width=32)))
@settings(max_examples=30, deadline=None)
def test_any_float_gives_a_probability(program: bytes, x: np.ndarray) -> None:
    p = load_once(program)(x)
    assert ((p >= 0) & (p <= 1)).all()


_loaded: dict[bytes, Any] = {}


def load_once(data: bytes) -> Any:
    return _loaded.setdefault(data, load_program(data)) if data not in _loaded else _loaded[data]


def test_read_only_and_strided_rows_are_taken_without_a_warning(
    program: bytes, recwarn: pytest.WarningsRecorder
) -> None:
    x = some_rows(20)
    x.setflags(write=False)
    assert np.allclose(load_program(program)(x[::2]), load_program(program)(x.copy())[::2], atol=1e-6)
    assert not [w for w in recwarn if "writ" in str(w.message)]


def test_what_is_no_program_or_does_not_fit_one_is_an_error_with_a_remedy(program: bytes) -> None:
    for data in (b"", b"nonsense", program[: len(program) // 2]):
        with pytest.raises(ModelError, match="export it anew"):
            load_program(data)
    with pytest.raises(ModelError, match=r"takes \[rows, 4\] float32, not \[3, 5\]"):
        load_program(program)(np.zeros((3, 5), np.float32))
    two_rows_alone = io.BytesIO()
    net = torch.nn.Sequential(torch.nn.Linear(4, 1), torch.nn.Flatten(0))
    torch.export.save(torch.export.export(net, (torch.zeros(2, 4),)), two_rows_alone)
    with pytest.raises(ModelError, match=r"does not take \[3, 4\].*dynamic_shapes"):
        load_program(two_rows_alone.getvalue())(some_rows(3))
    broken = torch.nn.Linear(4, 1)
    torch.nn.init.constant_(broken.weight, NAN)
    with pytest.raises(ModelError, match="NaN or infinity: roll back"):
        load_program(export_program(torch.nn.Sequential(broken, torch.nn.Flatten(0)), 4))(some_rows(1))


def test_a_net_that_does_not_fit_is_refused_before_it_is_trained() -> None:
    with pytest.raises(SpecError, match=r"gives \[2, 1\], not \[2\]"):
        build_net(lambda n: torch.nn.Linear(n, 1), 3)
    with pytest.raises(SpecError, match="RuntimeError: mat1 and mat2"):
        build_net(lambda n: torch.nn.Linear(n + 1, 1), 3)
    with pytest.raises(SpecError, match=r"BatchNorm1d.*use LayerNorm"):
        build_net(
            lambda n: torch.nn.Sequential(torch.nn.BatchNorm1d(n), torch.nn.Linear(n, 1), torch.nn.Flatten(0)).eval(), 3
        )


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=60))
@settings(max_examples=30, deadline=None)
def test_auc_and_log_loss_are_those_of_scikit_learn(pairs: list[tuple[int, bool]]) -> None:
    p = np.array([a for a, _ in pairs], np.float32) / 7 + 0.01
    y = np.array([b for _, b in pairs], np.float32)
    assert np.isclose(log_loss(p, y), their_log_loss(y, p.astype(np.float64), labels=[0, 1]))
    if 0 < y.sum() < len(y):
        assert np.isclose(auc(p, y), roc_auc_score(y, p))
    else:
        assert np.isnan(auc(p, y))


def a_table(x: np.ndarray, y: np.ndarray) -> pa.Table:
    return pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1]), "y": pa.array(y)})


def test_the_baseline_is_a_program_of_the_same_kind() -> None:
    x = some_rows(4000)
    y = (np.nan_to_num(x[:, 0]) > np.random.default_rng(1).normal(3, 2, 4000)).astype(np.float32)
    table = a_table(x, y)
    result = baseline(TrainingSet(manifest=MANIFEST, train_ref=table.slice(0, 3000), evaluate_ref=table.slice(3000)))
    assert result.epochs[0].evaluate_auc > 0.85
    p = load_program(result.program)(x[3000:])
    assert np.isclose(auc(p, y[3000:]), result.epochs[0].evaluate_auc)
    with pytest.raises(TrainingError, match="same label"):
        baseline(TrainingSet(manifest=MANIFEST, train_ref=a_table(x, np.ones(4000, np.float32)), evaluate_ref=table))


def test_columns_are_views_of_the_table_also_of_a_slice_and_of_chunks() -> None:
    x, y = some_rows(10), np.arange(10, dtype=np.float32)
    table = a_table(x, y)
    seen, _ = columns_of(table)
    assert seen.ctypes.data == table.column("x").chunk(0).values.to_numpy().ctypes.data
    for part, rows in ((table.slice(3, 4), slice(3, 7)), (pa.concat_tables([table, table]), [*range(10), *range(10)])):
        got_x, got_y = columns_of(part)
        assert np.array_equal(got_x, x[rows], equal_nan=True) and np.array_equal(got_y, y[rows])
    assert columns_of(table.slice(0, 0))[0].shape == (0, 4)
    for bad, words in (
        (table.drop_columns("y"), "lacks column 'y'"),
        (table.set_column(1, "y", pa.array([None, *y[1:]], pa.float32())), "nulls in 'y'"),
        (table.set_column(0, "x", pa.array(x.tolist())), "not fixed_size_list"),
    ):
        with pytest.raises(ContractError, match=words):
            columns_of(bad)
