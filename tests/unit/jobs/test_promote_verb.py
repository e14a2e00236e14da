"""`raymill promote` and `rollback`: what the registry says is what the replicas serve, also where they can not."""

import pytest

from raymill.jobs.cli import promote as verb
from raymill.jobs.cli import rollback as back
from raymill.runtime.errors import ModelError
from raymill.runtime.records import RecordsActor


class Replicas:
    """Follow the registry, but for versions that they can not load."""

    def __init__(self, broken=(), serve=True):
        self.broken, self.serve = broken, serve

    def follow(self, records, model):
        live = [v.version for v in records.versions(model) if v.stage == "live"]
        if set(live) & set(self.broken):
            raise ModelError(f"version {live[0]} of {model}: damaged")
        return self.serve

    def close(self):
        pass


@pytest.fixture
def apply(tmp_path, monkeypatch, capsys):
    """Run a verb's function on a registry of three versions, of which the first is live."""
    records = RecordsActor(tmp_path)
    records.start()
    for number in (1, 2, 3):
        records.register("m", "xgboost", b"%d" % number, None, "", {}, 0.5)
    records.promote("m", 1, reason="first")

    def run(function, *args, replicas):
        def changed(model, change, undo, as_json):
            live, served = verb.bring_live(model, records, replicas, change, undo)
            print(verb._told(live, served))

        monkeypatch.setattr(verb, "change_live", changed)
        monkeypatch.setattr(back, "change_live", changed)
        try:
            function(*args, reason="by hand")
        finally:
            run.stages = {v.version: str(v.stage) for v in records.versions("m")}
            run.why = records.versions("m")[1].history[-1]["reason"]
        return capsys.readouterr().out.strip()

    yield run
    records.stop()


def test_a_version_that_does_not_load_is_not_live_in_the_registry_either_nor_rolled_back_to(apply):
    with pytest.raises(ModelError, match="damaged"):
        apply(verb.promote, "m", 2, replicas=Replicas(broken=[2]))
    assert apply.stages == {1: "live", 2: "retired", 3: "candidate"} and apply.why.startswith("not loaded: version 2")
    apply(verb.promote, "m", 3, replicas=Replicas())
    assert apply(back.rollback, "m", replicas=Replicas()) == "m version 1 is live"


def test_a_roll_back_to_what_does_not_load_leaves_live_what_was(apply):
    apply(verb.promote, "m", 2, replicas=Replicas())
    with pytest.raises(ModelError, match="damaged"):
        apply(back.rollback, "m", replicas=Replicas(broken=[1]))
    assert apply.stages == {1: "retired", 2: "live", 3: "candidate"}


def test_where_nothing_serves_the_model_it_is_said(apply):
    said = apply(verb.promote, "m", 2, replicas=Replicas(serve=False))
    assert said.startswith("m version 2 is live in the registry, but nothing serves m")
