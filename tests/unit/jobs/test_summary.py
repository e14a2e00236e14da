from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from raymill.jobs.replay import DAY_US, iso_date, moment
from raymill.jobs.summary import months


@given(st.integers(0, 20_000), st.integers(1, 900))
def test_months_cover_the_range_without_gap_or_overlap(first, days):
    start, end = first * DAY_US, (first + days) * DAY_US
    found = months(start, end)
    assert found[0][0] == start and found[-1][1] == end
    assert all(a[1] == b[0] for a, b in pairwise(found))
    assert all(b < e for b, e in found)


def test_a_sliver_of_a_month_goes_with_the_month_before():
    found = months(moment("2013-11-15"), moment("2014-01-02"))
    assert [(iso_date(b), iso_date(e)) for b, e in found] == [
        ("2013-11-15", "2013-12-01"),
        ("2013-12-01", "2014-01-02"),
    ]
