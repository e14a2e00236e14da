"""When requests of a load are due: at an even rate, or one that grows evenly."""

import numpy as np
import pytest

from benchmarks.open_loop import due_after_s


@pytest.mark.parametrize(("rate", "growth", "most"), [(250.0, 0.0, 0.0), (1.0, 4.0, 80.0), (60.0, 0.5, 70.0)])
def test_each_second_as_many_are_due_as_the_rate_then_says(rate, growth, most):
    due = [due_after_s(n, rate, growth, most) for n in range(4000)]
    seconds = np.arange(1, int(min(due[-1], 50)))
    came = np.histogram(due, bins=np.append(seconds, seconds[-1] + 1))[0]
    middle = rate + growth * (seconds + 0.5)
    assert due[0] == 0
    np.testing.assert_allclose(came, np.minimum(middle, most) if growth else middle, atol=1.5)
