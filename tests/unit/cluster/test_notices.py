from dataclasses import replace

from raymill.cluster.notices import Reclaim, add, due, ledger_events, pending, untold
from raymill.runtime.messages import Notice


def reclaim(node, deadline_s=10.0, **fields):
    return Reclaim(notice=Notice(node_id=node, deadline_s=deadline_s, reason="spot reclaim"), noticed_s=1.0, **fields)


def test_a_node_noticed_twice_keeps_the_earlier_deadline_and_is_told_of_it():
    known = [reclaim("a", 10.0, told=True)]
    assert add(known, [reclaim("a", 20.0)]) == known
    sooner = add(known, [reclaim("a", 5.0)])
    assert [(r.notice.deadline_s, r.told) for r in sooner] == [(5.0, False)]


def test_a_node_that_was_taken_is_not_taken_again():
    taken = reclaim("a", reclaimed_s=11.0)
    assert add([taken], [reclaim("a", 5.0)]) == [taken]
    assert due([taken], 99.0) == [] and pending([taken]) == frozenset() and untold([taken]) == []


def test_a_node_is_due_at_its_deadline_and_not_before():
    waiting = reclaim("a", 10.0)
    assert due([waiting], 9.99) == [] and due([waiting], 10.0) == [waiting]


def test_events_have_one_key_a_node_so_that_repeating_them_writes_nothing():
    waiting = reclaim("a")
    taken = replace(waiting, reclaimed_s=12.5)
    events = ledger_events([waiting, taken])
    assert [e.key for e in events] == ["spot.noticed/a", "spot.noticed/a", "spot.reclaimed/a"]
    assert events[-1].data["late_s"] == 2.5
