"""The grid on icons: equal budgets of tuning, references of the other pool, nothing trained twice."""

from experiments.clip.cli.parser import check_method, check_options
from experiments.clip.study.cells import TunedKey
from experiments.clip.study.icon_grid import (
    ICONS,
    MAIN,
    MORE,
    PASSES,
    PUBLIC,
    PUBLIC_SETTINGS,
    REFERENCES,
    RIVALS,
    SCHEDULED,
    SEEDS,
    SETTINGS,
    STRONG,
    STUDIES,
    TUNING_STUDIES,
)
from experiments.clip.study.planning import cell_hash, planned_trainings
from experiments.clip.study.settings import TWIN
from experiments.clip.study.studies import tried_settings

TUNING_OF = dict.fromkeys(MORE, "icon-tuning-more") | dict.fromkeys(RIVALS, "icon-tuning-rivals")
TUNED = {
    TunedKey(TUNING_OF.get(method, "icon-tuning"), "natural", method, reference): settings[0]
    for method, settings in SETTINGS.items()
    for reference in ("", STRONG)
} | {TunedKey("icon-tuning-public", "natural", "drrho", PUBLIC): PUBLIC_SETTINGS[0]}


def test_every_method_is_tuned_over_as_many_settings_at_the_smallest_budget():
    assert {len(settings) for settings in SETTINGS.values()} == {4}
    assert set(SETTINGS) | {SCHEDULED} == {*MAIN, *MORE, *RIVALS}
    cells = [each.cell for each in planned_trainings(TUNING_STUDIES, {})]
    assert len(cells) == 4 * len(SETTINGS) + len(PUBLIC_SETTINGS)
    assert {(cell.train.seed, cell.train.split) for cell in cells} == {(0, "train")}
    # Equal in backward passes: of a selection's candidates, half are trained on.
    assert all(cell.train.optimization.epochs == PASSES[0] * (2 if cell.method == "aced" else 1) for cell in cells)


def test_nothing_that_uses_a_setting_is_planned_before_it_is_tuned():
    for name, study in STUDIES.items():
        assert bool(list(study({}))) == (name in (*TUNING_STUDIES, "icon-references"))
        assert list(study(TUNED)), name


def test_the_scheduled_coefficient_has_the_settings_of_the_twin():
    for seed in SEEDS:
        cells = {cell.method: cell for cell in STUDIES["icon-headline"](TUNED) if cell.train.seed == seed}
        scheduled, twin = cells[SCHEDULED].train, cells[TWIN].train
        assert scheduled.optimization == twin.optimization
        assert scheduled.loss.temperature == twin.loss.temperature and scheduled.loss.coefficient == "scheduled"
        assert cells[SCHEDULED].reference == STRONG and cells[TWIN].reference == ""


def test_the_public_reference_has_a_tuning_of_its_own():
    public = [*STUDIES["icon-public"](TUNED)]
    assert {(cell.method, cell.reference) for cell in public} == {("drrho", PUBLIC)}
    assert {cell.train.loss for cell in public} == {PUBLIC_SETTINGS[0].loss} != {SETTINGS["drrho"][0].loss}
    assert [cell.train.seed for cell in public] == [*SEEDS[:3], *SEEDS]
    key = TunedKey("icon-tuning-public", "natural", "drrho", PUBLIC)
    assert tried_settings(key) == PUBLIC_SETTINGS


def test_trainings_are_valid_and_those_of_several_studies_are_one():
    trainings = planned_trainings(STUDIES, TUNED)
    for each in trainings:
        train = each.cell.train
        assert train.data.kind == "icons" and train.data.pixels == ICONS.pixels
        assert each.cell.reference in ("", *REFERENCES)
        check_method(train.loss)
        if not train.needs_reference:  # the others get it when it is trained
            check_options(train)
    assert {train.split for train in REFERENCES.values()} == {"reference"}
    quality = [cell for cell in STUDIES["icon-reference-quality"](TUNED)]
    assert {cell.reference for cell in quality} == set(REFERENCES) - {STRONG, PUBLIC}
    noisy = {cell_hash(cell) for cell in STUDIES["icon-noise"](TUNED)}
    assert not noisy & {cell_hash(cell) for cell in STUDIES["icon-headline"](TUNED)}
