"""`raymill serve`: what it takes for a model, what becomes of versions, and what a caller is told."""

import io
import json
import os
import pickle
import shlex
import subprocess
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest

from raymill.actors import envelope, model_files
from raymill.actors.endpoint import Placement
from raymill.actors.named_inputs import NamedInputs, spec_alone
from raymill.actors.scheduler import GpuPoolScheduler
from raymill.jobs.cli.output import out
from raymill.jobs.cli.serve import _print, describe
from raymill.jobs.model_target import Target, Wish, read_target
from raymill.jobs.serving_alone import bring_back, give_up_grant, put_up, take_off
from raymill.runtime.errors import Conflict, ModelError, SpecError, UnknownModel, Usage
from raymill.runtime.messages import Manifest
from raymill.runtime.records import RecordsActor
from tests.unit.actors.test_scheduler import DictPool

X = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of a user."""
    import xgboost

    made = tmp_path_factory.mktemp("work")
    data = xgboost.DMatrix(X, X[:, 0] > 0, feature_names=["a", "b", "c"])
    xgboost.train({"objective": "binary:logistic", "nthread": 1}, data, 2).save_model(made / "trees of.ubj")
    (made / "mine.py").write_text(
        "def ask(x):\n    return x[:, 0]\n\ndef nothing(x):\n    return x[:, 0] * float('nan')\n\nasked = 3\n"
    )
    (made / "line.pkl").write_bytes(pickle.dumps({"a": 1}))
    return made


def test_a_file_says_its_inputs_names_and_kind(folder):
    target = read_target(str(folder / "trees of.ubj"), Wish())
    assert (target.name, target.kind, target.inputs) == ("trees-of", "xgboost", ("a", "b", "c"))
    named = read_target(str(folder / "trees of.ubj"), Wish(name="mine", features="x, y,z"))
    assert (named.name, named.inputs) == ("mine", ("x", "y", "z"))


def test_code_beside_the_user_travels_with_the_version(folder, monkeypatch):
    monkeypatch.chdir(folder)
    target = read_target("mine:ask", Wish(features="2"))
    assert (target.name, target.kind, target.inputs) == ("ask", "code", ("f0", "f1"))
    assert "def ask" in envelope.unpack(target.data).source
    assert read_target("mine.py:ask", Wish(features="2")).data == target.data
    (folder / "mine.py").rename(folder / "gone.py")
    assert np.array_equal(model_files.load(target.data).run(X), X[:, 0])
    (folder / "gone.py").rename(folder / "mine.py")


@pytest.mark.parametrize("form", ["safetensors", "torch"])
def test_weights_come_in_either_form_and_nothing_but_tensors_does(tmp_path, monkeypatch, form):
    import torch
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text("import torch\n\ndef net():\n    return torch.nn.Linear(3, 1)\n")
    state = torch.nn.Linear(3, 1).state_dict()
    weights = tmp_path / "weights"
    save_file(state, weights) if form == "safetensors" else torch.save(state, weights)
    target = read_target("nets:net", Wish(features="3", weights=weights))
    answer = X @ state["weight"].numpy()[0] + state["bias"].numpy()
    assert np.allclose(model_files.load(target.data).run(X), answer, atol=1e-6)
    torch.save({"net": torch.nn.Linear(3, 1)}, weights)
    with pytest.raises(Usage, match=r"^\S+ holds more than a net's weights \(torch.nn.modules.linear.Linear\): save"):
        read_target("nets:net", Wish(features="3", weights=weights))


@pytest.mark.parametrize(
    ("text", "wish", "told"),
    [
        ("nothing.ubj", Wish(), "there is no file 'nothing.ubj'"),
        (".", Wish(), "Is a directory"),
        ("line.pkl", Wish(), "pickle, which is never loaded: .*skops"),
        ("mine.py", Wish(), "no model file"),
        ("mine:ask", Wish(), "--features 12"),
        ("mine:asked", Wish(features="2"), "can not be called"),
        ("mine:absent", Wish(features="2"), "no attribute 'absent'"),
        ("no_such_module:ask", Wish(features="2"), "there is no module 'no_such_module'"),
        ("trees of.ubj", Wish(features="4"), "--features says 4 inputs, and trees of.ubj takes 3"),
        ("trees of.ubj", Wish(features="0"), "--features says 0 inputs"),
        ("trees of.ubj", Wish(features="-3"), "--features says -3 inputs"),
        ("trees of.ubj", Wish(features="a,b,a"), r"inputs \['a'\] can not come by name"),
        ("trees of.ubj", Wish(features="a,,b"), "one has no name"),
        ("mine:nothing", Wish(features="2"), "answers nan where all inputs are 0"),
        ("trees of.ubj", Wish(name="a/b"), "no name for a model"),
        ("trees of.ubj", Wish(compiled=True), "--weights and --compile"),
    ],
)
def test_what_can_not_be_served_is_told_before_anything_starts(folder, monkeypatch, text, wish, told):
    monkeypatch.chdir(folder)
    with pytest.raises(Usage, match=told):
        read_target(text, wish)


class FakeEndpoint:
    """Takes what it is told to serve, and refuses when it is told to."""

    def __init__(self):
        self.served, self.noted, self.refuses, self.deployments = [], [], False, []

    def turn(self):
        return nullcontext()

    def models(self):
        return self.served

    def set_models(self, models):
        if self.refuses:
            raise ModelError("not loaded")
        self.served = list(models)

    def deploy(self, models, placement):
        self.deployments.append(placement.replicas)
        self.set_models(models)

    def crash(self):
        self.noted, self.served = self.served, []

    def remembered(self):
        return self.noted

    def forget(self):
        self.noted = []

    def delete(self):
        self.served = []


@pytest.fixture
def records(tmp_path):
    found = RecordsActor(tmp_path)
    found.start()
    yield found
    found.stop()


@pytest.fixture
def scheduler(records):
    """The scheduler itself, on a pool of a head with four processors."""
    found = GpuPoolScheduler(records, pool=DictPool())
    found.start()
    yield found
    found.stop()


@pytest.fixture
def serving(records, scheduler):
    endpoint = FakeEndpoint()

    def serve(data, name="m", promote=False, inputs=("a", "b")):
        target = Target(name=name, kind="xgboost", data=data, inputs=inputs)
        return put_up(target, records, endpoint, scheduler, Placement(resources={"head": 0.01}), promote=promote)

    return serve, records, endpoint


def stages(records, name="m"):
    return [str(v.stage) for v in records.versions(name)]


def roles(endpoint, name="m"):
    (found,) = [m for m in endpoint.served if m.name == name]
    return {r.version: (str(r.role), r.weight) for r in found.routes}


def test_the_next_file_is_a_canary_the_one_after_takes_its_place_and_promote_makes_it_live(serving):
    serve, records, endpoint = serving
    assert serve(b"one").stage == "live" and serve(b"one").version == 1
    assert serve(b"two").stage == "canary" and roles(endpoint) == {1: ("live", 0.8), 2: ("canary", 0.2)}
    serve(b"three")
    assert stages(records) == ["live", "rejected", "canary"] and set(roles(endpoint)) == {1, 3}
    assert serve(b"four", promote=True).stage == "live"
    assert stages(records) == ["retired", "rejected", "rejected", "live"] and set(roles(endpoint)) == {4}
    with pytest.raises(Conflict, match="--promote makes it live again"):
        serve(b"one")
    assert serve(b"one", promote=True).version == 1 and stages(records)[0] == "live"
    with pytest.raises(Conflict, match="rejected for good"):
        serve(b"two")


def test_models_stand_beside_each_other_on_one_application_under_one_grant(serving, scheduler):
    serve, records, endpoint = serving
    serve(b"one")
    serve(b"other", name="n", inputs=("x",))
    assert [m.name for m in endpoint.served] == ["m", "n"] and endpoint.deployments == [1]
    (lease,) = scheduler.leases("serve")
    assert lease.resources == {"CPU": 1.0, "head": 0.01}
    give_up_grant(scheduler, reason="a pipeline's replicas take its place")
    assert scheduler.leases("serve") == []
    assert stages(records, "n") == ["live"]


def test_a_model_is_taken_off_beside_the_others_and_its_file_puts_it_back(serving, scheduler):
    serve, records, endpoint = serving
    serve(b"one")
    serve(b"two")
    serve(b"other", name="n", inputs=("x",))
    with pytest.raises(UnknownModel, match="'k' is not served; served: m, n"):
        take_off("k", endpoint, scheduler)
    assert take_off("m", endpoint, scheduler) == ["n"] and len(scheduler.leases("serve")) == 1
    assert [m.name for m in endpoint.served] == ["n"] and stages(records) == ["live", "canary"]
    assert serve(b"one").stage == "live" and roles(endpoint) == {1: ("live", 0.8), 2: ("canary", 0.2)}
    take_off("m", endpoint, scheduler)
    assert take_off("n", endpoint, scheduler) == [] and endpoint.served == [] and scheduler.leases("serve") == []
    with pytest.raises(UnknownModel, match="served: nothing"):
        take_off("n", endpoint, scheduler)


def test_what_was_served_comes_back_after_a_crash_but_for_a_pipelines(serving, scheduler):
    serve, _, endpoint = serving
    serve(b"one")
    serve(b"two")
    serve(b"other", name="n", inputs=("x",))
    before = endpoint.served
    place = Placement(resources={"head": 0.01})
    assert bring_back(endpoint, scheduler, place) == ([], []) and endpoint.deployments == [1]
    give_up_grant(scheduler, reason="the cluster has ended")
    endpoint.crash()
    endpoint.noted = [*before, replace(before[0], name="p", plan={"features": []})]
    endpoint.refuses = True
    with pytest.raises(ModelError):
        bring_back(endpoint, scheduler, place)
    assert scheduler.leases("serve") == [] and endpoint.noted
    endpoint.refuses = False
    assert bring_back(endpoint, scheduler, place) == (["m", "n"], ["p"])
    assert endpoint.served == before and len(scheduler.leases("serve")) == 1


def test_what_was_taken_off_does_not_come_back(serving, scheduler):
    serve, _, endpoint = serving
    serve(b"one")
    endpoint.noted = endpoint.served
    take_off("m", endpoint, scheduler)
    assert bring_back(endpoint, scheduler, Placement()) == ([], []) and endpoint.served == []


def test_a_pipelines_model_is_not_taken_off(serving, scheduler):
    serve, _, endpoint = serving
    serve(b"one")
    endpoint.served = [replace(m, plan={"features": []}) for m in endpoint.served]
    with pytest.raises(Conflict, match="model of a pipeline"):
        take_off("m", endpoint, scheduler)
    assert len(endpoint.served) == len(scheduler.leases("serve")) == 1


def test_a_version_that_does_not_load_stays_a_candidate_and_may_be_tried_again(serving, scheduler):
    serve, records, endpoint = serving
    endpoint.refuses = True
    with pytest.raises(ModelError):
        serve(b"one")
    assert scheduler.leases("serve") == []
    assert stages(records) == ["candidate"] and endpoint.served == []
    endpoint.refuses = False
    assert serve(b"one").stage == "live" and stages(records) == ["live"]


def test_other_inputs_and_a_pipelines_name_are_refused(serving):
    serve, records, _ = serving
    serve(b"one")
    with pytest.raises(Usage, match=r"2 inputs .* this one 3"):
        serve(b"two", inputs=("a", "b", "c"))
    made = Manifest(
        pipeline="p", lake_versions={}, features=("a",), feature_hashes={}, label="l", label_rule=[], start_at=0,
        end_at=1, known_until=1, rows=1, without_label=0,
    )  # fmt: skip
    records.register("p", "model", b"trained", made, "t", {}, 0.5)
    with pytest.raises(Conflict, match="model of a pipeline"):
        serve(b"two", name="p")


def test_inputs_that_a_row_can_not_carry_are_refused_and_the_others_are_read_by_name():
    import pyarrow as pa

    for inputs in (("id", "a"), ("a", "a")):
        with pytest.raises(SpecError, match="--features"):
            spec_alone("m", inputs, [])
    rows = pa.table({"a": pa.array([1.0, None]), "b": pa.array([2.0, 1e300])})
    x = NamedInputs().vectors(rows, np.zeros(2, np.int64))
    assert x.dtype == np.float32 and np.array_equal(x, np.array([[1, 2], [np.nan, np.inf]], np.float32), equal_nan=True)


def test_the_printed_requests_can_be_pasted(serving):
    serve, _, _ = serving
    target = Target(name="m", kind="code", data=b"", inputs=("it's", "b"))
    told = describe(target, serve(b"one"), "http://127.0.0.1:8000")
    words = {form: shlex.split(curl) for form, curl in told["curl"].items()}
    assert json.loads(words["by name"][-1]) == {"rows": [{"it's": 0.0, "b": 0.0}]}
    assert json.loads(words["vectors"][-1])["inputs"][0]["shape"] == [1, 2]


def test_where_a_key_is_asked_for_what_is_printed_sends_the_callers_own(serving, tmp_path, monkeypatch):
    """The printed lines, run by a shell that has a `raymill` and a `curl` which tell what they got."""
    serve, _, _ = serving
    target = Target(name="m", kind="code", data=b"", inputs=("a",))
    monkeypatch.setattr(out, "file", io.StringIO())
    _print(describe(target, serve(b"one", inputs=("a",)), "http://127.0.0.1:8000", with_key=True), ends_here=False)
    lines = [line.strip() for line in out.file.getvalue().splitlines()]
    pasted = [line for line in lines if line.startswith(("export", "curl"))]
    assert len(pasted) == 3
    for name, does in (("raymill", 'echo "rm_of_$3"'), ("curl", 'printf "%s\\n" "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    told = subprocess.run(["sh", "-c", "\n".join(pasted)], env=env, capture_output=True, text=True, check=True).stdout
    assert told.splitlines().count("authorization: Bearer rm_of_me") == 2
    assert "authorization" not in json.dumps(describe(target, serve(b"one", inputs=("a",)), "http://127.0.0.1:8000"))
