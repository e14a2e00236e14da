"""Which version answers which row."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymill.actors.rollout import Role, Route, choose, from_user_config, generation, reroute, to_user_config
from raymill.runtime.errors import SpecError
from raymill.runtime.ids import new_ids
from raymill.runtime.messages import ModelVersion, Stage
from tests.unit.actors.serving_parts import model


def routes(canary, extra=()):
    live = Route(version=1, digest="a", role=Role.LIVE, weight=1 - canary)
    return (live, Route(version=2, digest="b", role=Role.CANARY, weight=canary), *extra)


def test_an_id_gets_the_same_version_again_whatever_else_is_in_the_request():
    ids = new_ids(500)
    together = choose(ids, routes(0.3)).tolist()
    assert [choose([i], routes(0.3)).tolist()[0] for i in ids] == together


def test_a_canary_that_grows_keeps_the_ids_it_had():
    ids = new_ids(2000)
    small, large = choose(ids, routes(0.1)), choose(ids, routes(0.4))
    assert ((small == 1) <= (large == 1)).all()


def test_a_canary_gets_about_its_share():
    share = (choose(new_ids(20_000), routes(0.2)) == 1).mean()
    assert 0.18 < share < 0.22


def test_a_shadow_and_a_weight_of_nothing_never_answer():
    shadow = Route(version=3, digest="c", role=Role.SHADOW, weight=9.0)
    assert set(choose(new_ids(500), routes(0.0, (shadow,))).tolist()) == {0}
    with pytest.raises(ValueError, match="no version"):
        choose(["a"], (shadow,))


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=5), st.lists(st.text(max_size=8), max_size=20))
def test_every_id_gets_an_answering_version_whatever_the_weights(weights, ids):
    some = tuple(Route(version=i, digest="d", role=Role.LIVE, weight=w) for i, w in enumerate(weights))
    assert set(choose(ids, some).tolist()) <= set(range(len(weights)))


def test_the_user_config_is_json_and_comes_back_the_same():
    spec = model((1, "live", 0.8), (2, "canary", 0.2), (3, "shadow", 0.0))
    config = json.loads(json.dumps(to_user_config([spec])))
    assert from_user_config(config) == {"taxi": spec}
    assert generation(config) == generation(to_user_config([spec]))


def version(number, stage):
    return ModelVersion(
        model="taxi", version=number, stage=stage, kind="model", digest=f"d{number}", manifest=None, training_id="",
        metrics={}, threshold=0.3, created_s=0.0, history=(),
    )  # fmt: skip


def test_routes_follow_the_registry_and_a_rejected_shadow_goes():
    before = model((1, "live", 1.0), (2, "shadow", 0.0), (3, "shadow", 0.0), canary_weight=0.25)
    stages = [Stage.RETIRED, Stage.CANDIDATE, Stage.REJECTED, Stage.LIVE, Stage.CANARY]
    after = reroute(before, [version(n, s) for n, s in enumerate(stages, start=1)])
    assert [(r.version, r.role, r.weight) for r in after.routes] == [
        (2, Role.SHADOW, 0.0),
        (4, Role.LIVE, 0.75),
        (5, Role.CANARY, 0.25),
    ]


def test_a_config_that_lacks_a_part_is_refused_with_the_way_to_write_one():
    with pytest.raises(SpecError, match="to_user_config"):
        from_user_config({"models": {"taxi": {"label": "long"}}})
