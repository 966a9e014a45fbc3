"""The learning rate of each step, in numbers worked out by hand."""

import pytest

from speed import optim


def rates(steps, total, lr, warmup_steps):
    return [optim.lr_at(step, total, lr, warmup_steps) for step in steps]


def test_the_warm_up_is_a_line_that_does_not_begin_at_zero():
    """Step n of 5 has n sixths of the peak, and step 6 has the peak."""
    wanted = [0.000166667, 0.000333333, 0.0005, 0.000666667, 0.000833333, 0.001]
    assert rates(range(1, 7), 60, 1e-3, 5) == pytest.approx(wanted, rel=1e-5)


def test_after_the_warm_up_half_a_cosine_falls_towards_zero():
    """Without a warm-up, of 8 steps: (1 + cos(k * 22.5 degrees)) / 2 for k = 0 … 7."""
    wanted = [1.0, 0.961940, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.038060]
    assert rates(range(1, 9), 8, 1.0, 0) == pytest.approx(wanted, abs=1e-6)


def test_warm_up_and_cosine_together():
    """3 steps of warm-up in quarters, then 4 of cosine: 0, 45, 90 and 135 degrees."""
    wanted = [0.0005, 0.001, 0.0015, 0.002, 0.001707107, 0.001, 0.000292893]
    assert rates(range(1, 8), 7, 2e-3, 3) == pytest.approx(wanted, rel=1e-5)


def test_the_last_step_of_the_defaults():
    """Step 60 of 60 after 5 of warm-up: (1 - cos(180 / 55 degrees)) / 2 of the peak, which is still above 0."""
    assert rates([60], 60, 1e-3, 5) == pytest.approx([8.15460e-7], rel=1e-4)


@pytest.mark.parametrize("warmup_steps", [3, 10])
def test_a_warm_up_as_long_as_the_run_or_longer(warmup_steps):
    wanted = {3: [0.25, 0.5, 0.75], 10: [0.0909091, 0.1818182, 0.2727273]}[warmup_steps]
    assert rates([1, 2, 3], 3, 1.0, warmup_steps) == pytest.approx(wanted, rel=1e-6)


def test_a_step_beyond_the_last_has_no_rate():
    assert rates([61, 200], 60, 1e-3, 5) == pytest.approx([0, 0], abs=1e-12)
