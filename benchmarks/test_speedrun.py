"""speedrun.py: when a Dice is reached, what counts as a win, and that every row replaces what exists."""

import pkgutil

import numpy as np
import pytest
from speedrun import BASES, ROWS, compare, mean_and_error, time_to

import fastseg


def test_the_time_of_a_dice_lies_between_two_epochs():
    curve = [(10.0, 0.96), (20.0, 0.98), (30.0, 0.97), (40.0, 0.99)]
    assert [time_to(aim, curve) for aim in (0.95, 0.96, 0.97, 0.98)] == [10.0, 10.0, 15.0, 20.0]
    assert time_to(0.985, curve) == pytest.approx(37.5)
    assert time_to(0.995, curve) is None


def test_a_difference_is_counted_in_its_standard_errors():
    runs, base = ([{"0.98": value} for value in values] for values in ([5.0, 6.0, 7.0], [9.0, 10.0, 12.0]))
    errors = [np.std([run["0.98"] for run in some], ddof=1) / np.sqrt(3) for some in (runs, base)]
    assert mean_and_error([5.0, 6.0, 7.0]) == pytest.approx((6.0, errors[0]))
    assert compare(runs, base, "0.98") == pytest.approx((6 - 31 / 3) / np.hypot(*errors))
    assert compare([*runs, {"0.98": None}], base, "0.98") is None  # a run that has not reached it


@pytest.mark.parametrize("name", ROWS)
def test_rows_change_what_exists(name):
    row = ROWS[name]
    config = fastseg.Config(**{**BASES["default"], **row.fields})
    for target in row.patch(config, 10):
        assert callable(pkgutil.resolve_name(target)) or isinstance(pkgutil.resolve_name(target), float)
