"""What is merged, kept and thrown away, against the obvious way to say it."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from raymill.actors.lake_cache import IN_USE_S, Copy, to_remove
from raymill.actors.lake_layout import FEWEST, MERGED_BYTES, MERGED_ROWS, Part, Version, kept_versions, merges, unneeded

PARTS = st.lists(st.tuples(st.integers(0, MERGED_ROWS), st.integers(1, MERGED_BYTES), st.integers(0, 50)), max_size=60)


def parts(facts: list[tuple[int, int, int]]) -> list[Part]:
    return [Part(str(i), rows, size, order) for i, (rows, size, order) in enumerate(facts)]


@given(facts=PARTS, fewest=st.sampled_from([2, FEWEST]))
def test_merges_take_each_part_once_in_order_and_within_bounds(facts, fewest):
    groups = merges(parts(facts), fewest=fewest)
    taken = [p.path for g in groups for p in g]
    assert len(taken) == len(set(taken))
    for group in groups:
        assert len(group) > 1
        assert sum(p.rows for p in group) <= MERGED_ROWS and sum(p.size for p in group) <= MERGED_BYTES
        assert [p.order for p in group] == sorted(p.order for p in group)


@given(facts=PARTS)
def test_after_a_merge_by_hand_there_is_nothing_left_to_merge_but_what_grew_together_again(facts):
    left = parts(facts)
    for _ in range(20):
        groups = merges(left, fewest=2)
        if not groups:
            break
        gone = {p.path for g in groups for p in g}
        made = [
            Part(g[0].path, sum(p.rows for p in g), sum(p.size for p in g), min(p.order for p in g)) for g in groups
        ]
        assert len(left) - len(gone) + len(made) < len(left)
        left = [p for p in left if p.path not in gone] + made
    assert not merges(left, fewest=2)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 5000), appends=st.integers(1, 600), every=st.sampled_from([1, 32]))
def test_a_row_is_written_again_a_few_times_and_parts_stay_few(rows, appends, every):
    held, written = [], 0
    for number in range(appends):
        held.append(Part(str(number), rows, rows, number))
        groups = merges(held) if number % every == 0 else []
        gone = {p.path for g in groups for p in g}
        held = [p for p in held if p.path not in gone]
        for g in groups:
            total = sum(p.rows for p in g)
            written += total
            held.append(Part(g[0].path, total, total, g[0].order))
    assert sum(p.rows for p in held) == rows * appends
    assert written <= 4 * rows * appends  # log₈ of the appends
    assert len(held) <= 4 * (FEWEST + every) + rows * appends // (MERGED_ROWS // 2)


@given(st.data())
def test_kept_versions_have_every_file_of_every_version_to_keep(data):
    files, all_files, versions, names = set(), {}, [], iter(range(10_000))
    for number in range(data.draw(st.integers(1, 25))):
        removes = number > 0 and data.draw(st.integers(0, 3)) == 0
        if removes:
            files = {f for f in files if data.draw(st.booleans())}
        files = files | {next(names)}
        all_files[number] = frozenset(files)
        made = (versions[-1].made_ms if versions else 0) + data.draw(st.integers(0, 10))
        versions.append(Version(number, made, removes))
    pins = data.draw(st.sets(st.integers(0, 30), max_size=3))
    since = data.draw(st.integers(0, 300))
    ends = [v.made_ms for v in versions[1:]] + [10**9]
    wanted = {v.number for v, end in zip(versions, ends, strict=True) if end >= since or v.number in pins}
    kept = kept_versions(versions, pins, since)
    covered = frozenset().union(*(all_files[v] for v in kept))
    assert all(all_files[v] <= covered for v in wanted)
    assert set(kept) <= wanted  # nothing is kept for its own sake
    assert versions[-1].number in kept


def test_young_and_needed_files_stay():
    files = {"a": 1, "b": 5, "c": 9}
    assert unneeded(files, {"a"}, 9) == ["b"]
    assert unneeded(files, set(), 2) == ["a"]


@given(
    held=st.lists(st.tuples(st.integers(1, 100), st.floats(0, 2 * IN_USE_S)), max_size=20), room=st.integers(-50, 1500)
)
def test_copies_longest_unused_go_first_and_those_in_use_never(held, room):
    copies = [Copy(str(i), size, used) for i, (size, used) in enumerate(held)]
    now = 2 * IN_USE_S
    gone = set(to_remove(copies, room, now))
    left = [c for c in copies if c.name not in gone]
    assert all(now - c.used_s >= IN_USE_S for c in copies if c.name in gone)
    assert sum(c.size for c in left) <= room or all(now - c.used_s < IN_USE_S for c in left)
    if gone and left:
        assert max(c.used_s for c in copies if c.name in gone) <= min(c.used_s for c in left)
