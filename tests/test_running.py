"""Running estimates and the schedule of their rate."""

import pytest
import torch

from drrho.running import RunningEstimates, cosine_gamma, published_final_gamma


def test_a_sample_keeps_its_own_row():
    estimates = RunningEstimates(5)
    estimates.update(torch.tensor([3, 0]), (torch.tensor([0.5, -1.0]), torch.tensor([2.0, 0.0])))
    image, text = estimates.lookup(torch.arange(5))
    assert image.tolist() == [-1.0, -torch.inf, -torch.inf, 0.5, -torch.inf]
    assert text.tolist() == [0.0, -torch.inf, -torch.inf, 2.0, -torch.inf]
    assert estimates.visited == 2


def test_state_survives_a_round_trip_and_is_a_copy():
    estimates, other = RunningEstimates(3), RunningEstimates(3)
    estimates.update(torch.tensor([1]), (torch.tensor([4.0]), torch.tensor([5.0])))
    state = estimates.state_dict()
    other.load_state_dict(state)
    state["log_u"].zero_()
    assert other.lookup(torch.tensor([1]))[1].tolist() == [5.0]
    assert estimates.lookup(torch.tensor([0]))[0].tolist() == [-torch.inf]


@pytest.mark.parametrize("index, message", [([5], r"\[0, 5\), got 5"), ([-1], "got -1"), ([2, 2], "repeat.*2")])
def test_wrong_indices_are_refused_and_change_nothing(index, message):
    estimates = RunningEstimates(5)
    values = torch.zeros(len(index))
    with pytest.raises(ValueError, match=message):
        estimates.update(torch.tensor(index), (values, values))
    assert estimates.visited == 0


def test_non_finite_estimates_are_refused_by_sample():
    estimates = RunningEstimates(5)
    with pytest.raises(ValueError, match="sample 4"):
        estimates.update(torch.tensor([1, 4]), (torch.tensor([0.0, torch.nan]), torch.zeros(2)))
    assert estimates.visited == 0


def test_state_of_other_data_is_refused():
    with pytest.raises(ValueError, match="3 samples"):
        RunningEstimates(3).load_state_dict(RunningEstimates(4).state_dict())


def test_gamma_decays_from_one_to_final():
    values = [cosine_gamma(epoch, 5, 0.2) for epoch in range(5)]
    assert values[0] == 1.0
    assert values[-1] == pytest.approx(0.2)
    assert values[2] == pytest.approx(0.6)
    assert values == sorted(values, reverse=True)
    assert cosine_gamma(0, 1, 0.2) == 1.0


def test_published_rule():
    assert published_final_gamma(7) == 1.0
    assert published_final_gamma(30) == pytest.approx(4.177 * 30**-0.7265)
