"""The random numbers of a visit: a function of its place alone, which seeds every generator that augmentation uses."""

import random

import numpy as np
import torch

from experiments.clip.data.draws import Draws, random_state_restored, view_draws, visit_draws


def numbers():
    return torch.rand(()).item(), np.random.rand(), random.random()  # noqa: NPY002


def test_every_visit_has_draws_of_its_own():
    places = [(s, e, i, o) for s in (0, 1) for e in (0, 1) for i in (0, 2**40) for o in (0, 1)]
    drawn = [visit_draws(*place) for place in places] + [view_draws(9, row, view) for row in (0, 1) for view in (0, 1)]
    assert len({number for draws in drawn for number in draws[:3]}) == 3 * len(drawn)
    assert all(0 <= number < 2**64 for draws in drawn for number in draws)
    assert drawn[: len(places)] == [visit_draws(*place) for place in places]
    assert [view_draws(9, 7, view).choice for view in range(3)] == [0, 1, 2]


def test_draws_stay_those_of_earlier_versions():
    """Runs that are resumed, and cached views, depend on them."""
    assert visit_draws(1, 2, 3, 4) == Draws(
        1580186988125914412, 16800516175513130546, 11686260185353712799, 1208934984200422884
    )
    assert view_draws(5, 3, 1) == Draws(9926979004610525867, 12332180156684969974, 18082506268440528247, 1)


def test_seeding_gives_the_same_numbers_whatever_came_before():
    with random_state_restored():
        visit_draws(0, 0, 5, 0).seed_generators()
        expected = numbers()
        assert numbers() != expected
        visit_draws(0, 0, 5, 0).seed_generators()
        assert numbers() == expected
        visit_draws(0, 0, 6, 0).seed_generators()
        assert not set(numbers()) & set(expected)


def test_the_states_of_the_generators_are_restored():
    with random_state_restored():
        expected = numbers()
    with random_state_restored():
        visit_draws(0, 0, 0, 0).seed_generators()
        numbers()
    with random_state_restored():
        assert numbers() == expected
