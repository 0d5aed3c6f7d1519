"""Settings know their values, and are called by them."""

import pytest

from experiments.clip.study.settings import (
    LONGER_SETTINGS,
    PAST_EDGES,
    REFERENCE_SETTINGS,
    SETTINGS,
    find,
    settings_of,
)


@pytest.mark.parametrize("settings", [*SETTINGS.values(), *REFERENCE_SETTINGS.values(), *LONGER_SETTINGS.values()])
def test_values_and_names_tell_the_settings_of_a_method_apart(settings):
    assert len({each.name for each in settings}) == len(settings)
    for each in settings:
        assert find(settings, **each.values) is each


@pytest.mark.parametrize(
    "method, values, name",
    [
        ("drrho", {"temperature": 0.125, "lr": 1e-3}, "tau=0.125 lr=0.001"),
        ("drrho-c", {"coefficient": 1.5, "lr": 5e-4}, "c=1.5 lr=0.0005"),
        ("openclip", {"lr": 1.4e-3}, "lr=0.0014"),
        ("jest", {"candidates": 5, "lr": 2e-3}, "candidates=5 lr=0.002"),
        ("fastclip-v3", {"rho": 2.0, "lr": 1e-3}, "rho=2.0 lr=0.001"),
        ("distillation", {"distill_own_temperature": True, "distill": 0.2, "lr": 1e-3}, "own distill=0.2 lr=0.001"),
        ("distillation", {"distill_own_temperature": False, "distill": 0.2, "lr": 1e-3}, "distill=0.2 lr=0.001"),
    ],
)
def test_names_are_derived_from_values(method, values, name):
    setting = find(SETTINGS[method], **values)
    assert (setting.name, setting.values) == (name, values)


def test_a_setting_that_a_method_does_not_have_is_not_found():
    with pytest.raises(LookupError, match=r"no setting has the values {'lr': 1\.0}"):
        find(SETTINGS["openclip"], lr=1.0)


def test_a_setting_is_moved_past_the_edge():
    setting = SETTINGS["distillation"][-1].moved("distill", 0.06, 4e-3)
    assert (setting.name, setting.loss.distill, setting.loss.distill_own_temperature) == (
        "own distill=0.06 lr=0.004",
        0.06,
        True,
    )
    setting = SETTINGS["jest-top-k"][0].moved("candidates", 10, 2e-3)
    assert (setting.name, setting.selection.candidates) == ("candidates=10 lr=0.002", 10)
    for method, (option, _) in PAST_EDGES.items():
        assert all(option in each.values for each in SETTINGS[method])


def test_a_reference_has_settings_of_its_own():
    assert settings_of("drrho") is SETTINGS["drrho"]
    assert settings_of("drrho", "weak") is REFERENCE_SETTINGS["drrho"]
    assert all(len(settings) == 6 for settings in REFERENCE_SETTINGS.values())
