"""When requests of a load are due: at an even rate, or one that grows evenly."""

import numpy as np
import pytest

from benchmarks.open_loop import due_after_s


@pytest.mark.parametrize(("rate", "growth"), [(250.0, 0.0), (1.0, 4.0), (60.0, 0.5)])
def test_each_second_as_many_are_due_as_the_rate_then_says(rate, growth):
    due = [due_after_s(n, rate, growth) for n in range(5000)]
    seconds = np.arange(1, int(min(due[-1], 40)))
    came = np.histogram(due, bins=np.append(seconds, seconds[-1] + 1))[0]
    assert due[0] == 0
    np.testing.assert_allclose(came, rate + growth * (seconds + 0.5), atol=1.5)
