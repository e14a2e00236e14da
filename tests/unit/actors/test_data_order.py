from hypothesis import given, settings
from hypothesis import strategies as st

from raymill.actors.data_order import NOTHING_YET, Schedule, extend, permutation, share, undisturbed

schedules = st.builds(
    Schedule,
    rows=st.integers(1, 300),
    batch_rows=st.integers(1, 64),
    epochs=st.integers(1, 3),
    seed=st.integers(-(2**31), 2**63),
)


@given(schedules)
@settings(max_examples=60, deadline=None)
def test_every_row_is_trained_on_once_an_epoch(schedule: Schedule) -> None:
    for epoch in range(schedule.epochs):
        order = permutation(schedule.seed, epoch, schedule.rows)
        seen: list[int] = []
        for step in range(epoch * schedule.epoch_steps, (epoch + 1) * schedule.epoch_steps):
            batch = schedule.batch(step)
            assert batch.epoch == epoch and 0 < batch.stop - batch.start <= schedule.batch_rows
            assert schedule.epoch_end(step) == (epoch + 1) * schedule.epoch_steps
            seen += order[batch.start : batch.stop].tolist()
        assert sorted(seen) == list(range(schedule.rows))


@given(st.integers(0, 5000), st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_the_shares_of_any_number_of_ranks_tile_the_batch_in_order(rows: int, ranks: int) -> None:
    shares = [share(rows, ranks, rank) for rank in range(ranks)]
    assert [i for s in shares for i in range(rows)[s]] == list(range(rows))
    sizes = [s.stop - s.start for s in shares]
    assert max(sizes) - min(sizes) <= 1


def test_epochs_and_seeds_have_orders_of_their_own_that_do_not_change_with_numpy() -> None:
    assert permutation(13, 0, 8).tolist() == [7, 4, 3, 6, 2, 1, 0, 5]
    pinned = Schedule(rows=1000, batch_rows=64, epochs=2, seed=13)
    assert undisturbed(pinned) == "9f95cb3e7ddffea8a22e7986c607deab11ad571df295395d7200957965affae0"
    orders = {tuple(permutation(seed, epoch, 50).tolist()) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_the_digest_knows_a_swap_and_a_repetition() -> None:
    schedule = Schedule(rows=10, batch_rows=4, epochs=2, seed=1)
    digest, order = NOTHING_YET, permutation(1, 0, 10)
    for step in range(3):
        batch = schedule.batch(step)
        digest = extend(digest, order[batch.start : batch.stop])
    assert extend(NOTHING_YET, order[:4]) != extend(NOTHING_YET, order[:4][::-1])
    assert extend(digest, order[:4]) != digest
    assert (
        undisturbed(schedule) == undisturbed(schedule) != undisturbed(Schedule(rows=10, batch_rows=4, epochs=2, seed=2))
    )
    assert len(bytes.fromhex(undisturbed(schedule))) == len(digest)
