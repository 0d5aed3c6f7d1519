"""The grid of studies: every training is one that the command line gives, on a budget that is called what it is."""

from pathlib import Path

import pytest

from experiments.clip.cli.parser import as_words
from experiments.clip.ranges import check_options
from experiments.clip.run import parse
from experiments.clip.study import grid as study_grid
from experiments.clip.study.grid import STUDIES, TUNING_STUDIES, TunedKey
from experiments.clip.study.planning import planned_trainings
from experiments.clip.study.results import read_rows
from experiments.clip.study.settings import LONGER_SETTINGS, SETTINGS
from experiments.clip.study.tuned import read_tuned

RESULTS = Path(study_grid.__file__).parent / "results" / "study.csv"


@pytest.mark.slow
def test_every_cell_of_the_grid_is_a_training_that_the_command_line_gives():
    parsed = set()  # options with their values: a parser takes 40 ms
    for each in planned_trainings(STUDIES, read_tuned(RESULTS)):
        train = each.cell.train
        check_options(train)
        words = as_words(train)
        given = {tuple(words[place : place + 2]) for place, word in enumerate(words) if word.startswith("--")}
        if given - parsed:
            assert parse(["train", *words]) == train
            parsed |= given


@pytest.mark.slow
def test_budgets_are_whole_passes_and_called_what_they_are():
    setting = SETTINGS["openclip"][0]
    with pytest.raises(ValueError, match=r"epochs=2\.5 of lr=0\.0005 on a share 1 are 2\.5 passes"):
        study_grid.training(setting, "clean", epochs=2.5)
    assert study_grid.training(setting, "clean", epochs=2.5, fraction=0.5).optimization.epochs == 5
    labels = {
        each.cell.setting: each.cell.train
        for each in planned_trainings(STUDIES, read_tuned(RESULTS))
        if each.cell.setting.startswith("epochs=")
    }
    assert len(labels) >= 4
    assert all(train.optimization.epochs == int(label.removeprefix("epochs=")) for label, train in labels.items())
    budgets = {int(row["samples_trained"]) for row in read_rows(RESULTS).values() if row["setting"] == "epochs=1"}
    assert budgets == {study_grid.PAIRS_SEEN // study_grid.EPOCHS}


def test_all_committed_trainings_are_of_the_grid_and_none_is_left():
    planned = planned_trainings(STUDIES, read_tuned(RESULTS))
    rows = read_rows(RESULTS)
    assert set(rows) == {each.hash for each in planned}


def test_only_what_is_tuned_has_trainings():
    untuned = {name for name in STUDIES if not list(STUDIES[name]({}))}
    assert set(STUDIES) - untuned == {*TUNING_STUDIES, "references"}
    tuned = {TunedKey("tuning", "clean", "openclip"): SETTINGS["openclip"][1]}
    assert {cell.method for name in untuned for cell in STUDIES[name](tuned)} == {"openclip"}
    assert {cell.setting for cell in STUDIES["headline"](tuned)} == {"lr=0.001"}


def test_a_setting_past_an_edge_is_none_of_those_that_were_tried():
    tuned = read_tuned(RESULTS)
    tried = {each.hash for each in planned_trainings(["tuning", "tuning-more"], tuned)}
    past = {each.hash for each in planned_trainings(["edges"], tuned)}
    assert len(past) == 41 and not past & tried


def test_a_longer_training_waits_for_its_own_tuning():
    first, best = SETTINGS["openclip"][:2]
    tuned = {TunedKey("tuning", "swapped", "openclip"): first}
    assert ("openclip", "") in LONGER_SETTINGS and not list(STUDIES["longer"](tuned))
    tuned[TunedKey("tuning-longer", "swapped", "openclip")] = best
    assert {cell.train.optimization.lr for cell in STUDIES["longer"](tuned)} == {best.lr}
