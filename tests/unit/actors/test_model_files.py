"""Every kind of model file: told by its bytes, and answering as its own library does."""

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch

from raymill.actors import envelope, model_files
from raymill.actors.envelope import Envelope
from raymill.actors.model_files import Kind
from raymill.runtime.errors import MissingPackage, ModelError

X = np.random.default_rng(0).normal(size=(300, 3)).astype(np.float32)
Y = X[:, 0] + X[:, 1] > 0
FUNCTION = "def ask(x):\n    return x[:, 0] * 2\n"
NET = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(3, 1)

    def forward(self, x):
        return self.line(x)
"""


def saved(net):
    from safetensors.torch import save

    return save(net.state_dict())


def lightgbm_model(**changed):
    import lightgbm

    settings = {"objective": "binary", "verbose": -1, "num_threads": 1} | changed
    classes = np.arange(len(X)) % changed.get("num_class", 1) if "num_class" in changed else Y
    return lightgbm.train(settings, lightgbm.Dataset(X, classes), 5)


def test_lightgbm_answers_as_the_library_does_unknown_values_included():
    booster = lightgbm_model()
    x = X.copy()
    x[::7, 1] = np.nan
    loaded = model_files.load(booster.model_to_string().encode())
    assert (loaded.kind, loaded.columns, loaded.names) == (Kind.LIGHTGBM, 3, tuple(booster.feature_name()))
    assert np.array_equal(loaded.run(x), booster.predict(x).astype(np.float32))
    assert loaded.run(x[:0]).shape == (0,)


def test_a_model_of_lightgbm_that_was_cut_off_is_refused_though_the_library_takes_it():
    text = lightgbm_model().model_to_string()
    for cut in (20, 400, len(text) // 2, len(text) // 2 + 1, text.index("end of trees")):
        with pytest.raises(ModelError, match="cut off or damaged"):
            model_files.load(text[:cut].encode())


@pytest.mark.parametrize("named", [False, True])
def test_an_estimator_answers_as_scikit_learn_does(named):
    import pandas as pd
    import skops.io
    from sklearn.linear_model import LinearRegression
    from sklearn.tree import DecisionTreeClassifier

    rows = pd.DataFrame(X, columns=["a", "b", "c"]) if named else X
    classifier = DecisionTreeClassifier(max_depth=3).fit(rows, Y)
    loaded = model_files.load(skops.io.dumps(classifier))
    assert (loaded.kind, loaded.columns, loaded.names) == (Kind.SKLEARN, 3, ("a", "b", "c") if named else ())
    assert np.array_equal(loaded.run(X), classifier.predict_proba(rows)[:, 1].astype(np.float32))
    line = LinearRegression().fit(X, X[:, 0])
    assert np.array_equal(model_files.load(skops.io.dumps(line)).run(X), line.predict(X).astype(np.float32))


class Stranger:
    """A type that nobody trusts."""

    def predict(self, x):
        return x[:, 0]


def test_an_archive_with_a_strangers_type_is_refused_until_the_operator_names_it():
    import skops.io

    archive = skops.io.dumps(Stranger())
    with pytest.raises(ModelError, match="nobody trusts") as refused:
        model_files.load(archive)
    name = refused.value.message.rpartition("--trust ")[2]
    sealed = envelope.pack(Envelope(form="skops", trusted=(name,), payload=archive))
    assert model_files.kind_of(sealed) is Kind.SKLEARN
    assert np.array_equal(model_files.load(sealed).run(X), X[:, 0])


def test_a_graph_answers_as_onnx_runtime_does_and_as_the_model_it_was_made_of():
    import onnxruntime
    import skl2onnx
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression().fit(X, Y)
    data = skl2onnx.to_onnx(model, X[:1], options={"zipmap": False}).SerializeToString()
    loaded = model_files.load(data)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    assert (loaded.kind, loaded.columns) == (Kind.ONNX, 3)
    assert np.array_equal(loaded.run(X), session.run(["probabilities"], {"X": X})[0][:, 1])
    assert np.allclose(loaded.run(X), model.predict_proba(X)[:, 1], atol=1e-6)
    with pytest.raises(ModelError, match="zipmap"):
        model_files.load(skl2onnx.to_onnx(model, X[:1]).SerializeToString())


def test_code_answers_as_it_does_when_it_is_called_and_its_text_travels_along():
    loaded = model_files.load(envelope.pack(Envelope(form="code", target="mine:ask", source=FUNCTION)))
    assert np.array_equal(loaded.run(X), X[:, 0] * 2)
    other = envelope.pack(Envelope(form="code", target="mine:ask", source=FUNCTION.replace("2", "3")))
    assert np.array_equal(model_files.load(other).run(X), X[:, 0] * 3)  # versions of a module live beside each other
    assert np.array_equal(loaded.run(X), X[:, 0] * 2)


def test_a_net_takes_its_weights_where_they_lie_and_answers_as_torch_does():
    net = torch.nn.Linear(3, 1)
    weights = saved(torch.nn.ModuleDict({"line": net}))
    data = np.frombuffer(envelope.pack(Envelope(form="code", target="n:Net", source=NET, payload=weights)), np.uint8)
    loaded = model_files.load(memoryview(data))
    with torch.inference_mode():
        assert np.array_equal(loaded.run(X), net(torch.from_numpy(X)).numpy()[:, 0])
    made = envelope.unpack(memoryview(data))
    from raymill.actors.code_model import weights_of

    held = weights_of(made.payload)["line.weight"]
    assert data.ctypes.data <= held.data_ptr() < data.ctypes.data + len(data)
    assert held.data_ptr() % 4 == 0


@pytest.mark.soak
def test_a_compiled_net_answers_as_the_eager_one_whatever_the_number_of_rows():
    weights = saved(torch.nn.ModuleDict({"line": torch.nn.Linear(3, 1)}))
    eager, compiled = (
        model_files.load(
            envelope.pack(Envelope(form="code", target="n:Net", source=NET, payload=weights, compiled=how))
        ).run
        for how in (False, True)
    )
    for rows in (1, 2, 7, 64):
        assert np.allclose(compiled(X[:rows]), eager(X[:rows]), atol=1e-6)


def test_code_that_does_not_fit_is_told_with_its_name():
    def packed(**what):
        return envelope.pack(Envelope(form="code", **what))

    with pytest.raises(ModelError, match=r"absent:ask can not be imported .*: install that module"):
        model_files.load(packed(target="absent:ask"))
    with pytest.raises(ModelError, match=r"m:ask can not be imported .*SyntaxError.*: mend it"):
        model_files.load(packed(target="m:ask", source="def ask(x:"))
    with pytest.raises(ModelError, match=r"m:task can not be imported .*AttributeError.*: mend it"):
        model_files.load(packed(target="m:task", source="ask = sum"))
    with pytest.raises(ModelError, match=r"do not fit n:Net"):
        model_files.load(packed(target="n:Net", source=NET, payload=saved(torch.nn.Linear(3, 1))))
    with pytest.raises(ModelError, match="can not be called"):
        model_files.load(packed(target="m:ask", source="ask = 3"))
    deep = model_files.load(packed(target="m:ask", source="def ask(x):\n    return x[:, None]"))
    with pytest.raises(ModelError, match=r"gives \[300, 1, 3\] for 300 rows"):
        deep.run(X)
    broken = model_files.load(packed(target="m:ask", source="def ask(x):\n    return x[0]['a']"))
    with pytest.raises(ModelError, match="m:ask fails"):
        broken.run(X)


def test_several_classes_or_targets_are_answered_side_by_side_as_by_the_library():
    import skl2onnx
    import skops.io
    from sklearn.linear_model import LinearRegression, LogisticRegression
    from sklearn.tree import DecisionTreeClassifier

    booster = lightgbm_model(objective="multiclass", num_class=3)
    assert np.array_equal(
        model_files.load(booster.model_to_string().encode()).run(X), booster.predict(X).astype(np.float32)
    )
    classifier = LogisticRegression().fit(X, np.arange(len(X)) % 3)
    wanted = classifier.predict_proba(X).astype(np.float32)
    assert np.array_equal(model_files.load(skops.io.dumps(classifier)).run(X), wanted)
    graph = skl2onnx.to_onnx(classifier, X[:1], options={"zipmap": False}).SerializeToString()
    assert np.allclose(model_files.load(graph).run(X), wanted, atol=1e-6)
    lines = LinearRegression().fit(X, X[:, :2])
    assert np.array_equal(model_files.load(skops.io.dumps(lines)).run(X), lines.predict(X).astype(np.float32))
    two = skl2onnx.to_onnx(lines, X[:1]).SerializeToString()  # not the two probabilities of one question
    assert model_files.load(two).run(X).shape == (300, 2)
    code = envelope.pack(Envelope(form="code", target="m:ask", source="def ask(x):\n    return x"))
    assert np.array_equal(model_files.load(code).run(X), X)
    targets = DecisionTreeClassifier(max_depth=2).fit(X, np.stack([Y, ~Y], axis=1))
    with pytest.raises(ModelError, match="one estimator a target"):
        model_files.load(skops.io.dumps(targets))


class Bomb:
    def __reduce__(self):
        return (print, ("it was unpickled",))


def test_safetensors_are_told_as_such_though_their_length_looks_like_the_beginning_of_a_pickle():
    head = b'{"__metadata__":{}}'.ljust(128)
    with pytest.raises(ModelError, match=r"safetensors.*--weights"):
        model_files.load(len(head).to_bytes(8, "little") + head)


def test_pickles_are_refused_unread_with_the_way_to_save_it_instead(capsys):
    torch_file, jobfile = io.BytesIO(), io.BytesIO()
    torch.save({"bomb": Bomb()}, torch_file)
    import joblib

    joblib.dump(Bomb(), jobfile)
    for data, remedy in (
        (pickle.dumps(Bomb()), "skops"),
        (jobfile.getvalue(), "skops"),
        (torch_file.getvalue(), "safetensors"),
        (saved(torch.nn.Linear(3, 1)), "--weights"),
        (b"id,amount\n1,2\n", "skops"),
        (b"", "no model file"),
    ):
        with pytest.raises(ModelError, match=remedy):
            model_files.load(data)
    script = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(3, 1)), script)
    with pytest.raises(ModelError, match="TorchScript"):
        model_files.kind_of(script.getvalue())
    assert "unpickled" not in capsys.readouterr().out


def test_damaged_files_of_every_kind_are_refused():
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("readme.txt", "hello")
    for data in (b"PK\x03\x04 cut", other.getvalue(), b"\x08\x0a\x12\x08skl2onnx", model_files.ENVELOPE + b"{}\n"):
        with pytest.raises(ModelError):
            model_files.load(data)


def test_a_library_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lightgbm", None)
    with pytest.raises(MissingPackage, match=r"raymill\[models\]"):
        model_files.load(b"tree\nversion=v4\n")
