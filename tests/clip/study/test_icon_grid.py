"""The grid on icons at both scales: equal budgets of tuning, references of the other pool, nothing trained twice."""

import dataclasses

import pytest
import torch
from icon_archive import small_archive

from experiments.clip.cli.cost import cost_of
from experiments.clip.cli.parser import check_method, check_options
from experiments.clip.icons.package import VERSION
from experiments.clip.run import main
from experiments.clip.study.cells import TunedKey
from experiments.clip.study.icon_grid import (
    CORE,
    FINE_TUNED,
    GPU,
    GPU_REFERENCES,
    GPU_STUDIES,
    GPU_TUNING_STUDIES,
    MAIN,
    MORE,
    PUBLIC,
    PUBLIC_SETTINGS,
    REFERENCES,
    RIVALS,
    SCHEDULED,
    SEEDS,
    SETTINGS,
    STUDIES,
    TUNING_STUDIES,
    Scale,
)
from experiments.clip.study.planning import cell_hash, planned_trainings
from experiments.clip.study.results import read_rows
from experiments.clip.study.settings import TWIN
from experiments.clip.study.studies import tried_settings
from experiments.clip.training.options import Execution


def tuned_at(scale: Scale):
    """Return what a study knows when every method's first setting was found best."""
    more = dict.fromkeys(MORE, "-more") | dict.fromkeys(RIVALS, "-rivals")
    return {
        TunedKey(f"{scale.name}-tuning{more.get(method, '')}", "natural", method, reference): settings[0]
        for method, settings in SETTINGS.items()
        for reference in ("", scale.strong)
    } | {
        TunedKey("icon-tuning-public", "natural", "drrho", PUBLIC): PUBLIC_SETTINGS[0],
        TunedKey("icon-tuning-fine-tuned", "natural", "drrho", FINE_TUNED): SETTINGS["drrho"][2],
    }


TUNED = tuned_at(CORE)
GRIDS = [(CORE, STUDIES, TUNING_STUDIES, REFERENCES), (GPU, GPU_STUDIES, GPU_TUNING_STUDIES, GPU_REFERENCES)]
at_both_scales = pytest.mark.parametrize("scale, studies, tunings, references", GRIDS, ids=["core", "gpu"])


@at_both_scales
def test_every_method_is_tuned_over_as_many_settings_at_the_smallest_budget(scale, studies, tunings, references):
    assert {len(settings) for settings in SETTINGS.values()} == {4}
    assert set(SETTINGS) | {SCHEDULED} == {*MAIN, *MORE, *RIVALS}
    cells = [each.cell for each in planned_trainings(tunings, {})]
    of_public = len(PUBLIC_SETTINGS) + len(SETTINGS["drrho"]) if scale is CORE else 0
    assert len(cells) == 4 * len(SETTINGS) + of_public
    assert {(cell.train.seed, cell.train.split) for cell in cells} == {(0, "train")}
    # Equal in backward passes: of a selection's candidates, half are trained on.
    passes = {cell.train.selection.is_on: cell.train.optimization.epochs for cell in cells}
    assert passes == {True: 2 * scale.passes[0], False: scale.passes[0]}


@at_both_scales
def test_nothing_that_uses_a_setting_is_planned_before_it_is_tuned(scale, studies, tunings, references):
    for name, study in studies.items():
        assert bool(list(study({}))) == (name in (*tunings, f"{scale.name}-references"))
        assert list(study(tuned_at(scale))), name


def test_half_of_the_pairs_are_seen_as_often_as_all_of_them_are():
    cells = [*STUDIES["icon-half"](TUNED)]
    assert {cell.train.fraction * cell.train.optimization.epochs for cell in cells} == {CORE.passes[1]}
    whole = {each.hash for each in planned_trainings(("icon-budgets",), TUNED)}
    assert not whole & {cell_hash(cell) for cell in cells}


def test_the_scale_of_a_gpu_is_as_the_page_says():
    """10 million pairs by a model of 5 to 30 million parameters; more than 1,000 times the computation of a core's."""
    assert GPU.passes[-1] * 79_593 == pytest.approx(1e7, rel=0.01)
    small, large = cost_of(CORE.model), cost_of(GPU.model)
    assert 5e6 <= large.parameters <= 30e6
    assert GPU.passes[-1] * large.flops / (CORE.passes[0] * small.flops) == pytest.approx(4700, rel=0.02)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said where there is no GPU")
def test_the_scale_of_a_gpu_is_refused_without_one(tmp_path, capsys):
    words = ["study", "--data", "icons", "--large", "--only", "gpu-icon-tuning", "--cache", str(tmp_path)]
    assert main([*words, "--out", str(tmp_path / "out"), "--results", str(tmp_path / "t.csv")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cuda" in line
    assert main(["study", "--large", "--dry-run"]) == 2
    assert "--large" in capsys.readouterr().err


@pytest.mark.slow
def test_references_at_the_scale_of_a_gpu_are_trained_from_a_packed_archive(tmp_path, monkeypatch):
    """The same grid with a small model on this machine, its icons from the archive that travels."""
    pytest.importorskip("resvg_py", reason="icons are drawn by resvg_py, of the extra icons")
    cache, table, archive = tmp_path / "cache", tmp_path / "t.csv", small_archive(tmp_path / "icons.tgz")
    packed = cache / f"iconify-json-{VERSION}.tar.xz"
    assert main(["prepare", "--data", "icons", "--source", str(archive), "--pack", str(packed)]) == 0
    small = dict.fromkeys(GPU.references, ("glyph-micro", 1, 1e-3))
    here = dataclasses.replace(
        GPU, batch_size=16, references=small, execution=Execution(device="cpu", precision="bfloat16")
    )
    for name, train in here.trained_references().items():
        monkeypatch.setitem(GPU_REFERENCES, name, train)
    words = ["study", "--data", "icons", "--large", "--only", "gpu-icon-references", "--cache", str(cache)]
    assert main([*words, "--out", str(tmp_path / "out"), "--results", str(table)]) == 0
    (row,) = read_rows(table).values()  # the three are equal here, and trained once
    assert row["study"] == "gpu-icon-references" and float(row["test_top1"]) > 0
    assert (cache / "icons-64-full").is_dir()


def test_the_scheduled_coefficient_has_the_settings_of_the_twin():
    for seed in SEEDS:
        cells = {cell.method: cell for cell in STUDIES["icon-headline"](TUNED) if cell.train.seed == seed}
        scheduled, twin = cells[SCHEDULED].train, cells[TWIN].train
        assert scheduled.optimization == twin.optimization
        assert scheduled.loss.temperature == twin.loss.temperature and scheduled.loss.coefficient == "scheduled"
        assert cells[SCHEDULED].reference == CORE.strong and cells[TWIN].reference == ""


def test_the_public_reference_has_a_tuning_of_its_own():
    public = [*STUDIES["icon-public"](TUNED)]
    assert {(cell.method, cell.reference) for cell in public} == {("drrho", PUBLIC)}
    assert {cell.train.loss for cell in public} == {PUBLIC_SETTINGS[0].loss} != {SETTINGS["drrho"][0].loss}
    assert [cell.train.seed for cell in public] == [*SEEDS[:3], *SEEDS]
    key = TunedKey("icon-tuning-public", "natural", "drrho", PUBLIC)
    assert tried_settings(key) == PUBLIC_SETTINGS


def test_all_layers_of_the_fine_tuned_reference_learn():
    locked, free = REFERENCES[PUBLIC], REFERENCES[FINE_TUNED]
    assert locked.lock == ("image", "text") and free.lock == ()
    assert (free.model, free.pretrained, free.split) == (locked.model, locked.pretrained, locked.split)
    cells = [*STUDIES["icon-fine-tuned"](TUNED)]
    assert {(cell.method, cell.reference) for cell in cells} == {("drrho", FINE_TUNED)}
    assert {cell.train.loss for cell in cells} == {SETTINGS["drrho"][2].loss}  # as it was tuned for it
    twins = {(cell.train.optimization.epochs, cell.train.seed) for cell in STUDIES["icon-budgets"](TUNED)}
    assert {
        (cell.train.optimization.epochs, cell.train.seed) for cell in cells if cell.train.optimization.epochs > 2
    } == twins


@at_both_scales
def test_trainings_are_valid_and_those_of_several_studies_are_one(scale, studies, tunings, references):
    tuned = tuned_at(scale)
    trainings = planned_trainings(studies, tuned)
    for each in trainings:
        train = each.cell.train
        assert train.data.kind == "icons" and train.data.pixels == scale.pixels
        assert each.cell.reference in ("", *references)
        check_method(train.loss)
        if not train.needs_reference:  # the others get it when it is trained
            check_options(train)
    assert {train.split for train in references.values()} == {"reference"}
    quality = [cell for cell in studies[f"{scale.name}-reference-quality"](tuned)]
    assert {cell.reference for cell in quality} == set(references) - {scale.strong, PUBLIC, FINE_TUNED}
    noisy = {cell_hash(cell) for cell in studies[f"{scale.name}-noise"](tuned)}
    assert not noisy & {cell_hash(cell) for cell in studies[f"{scale.name}-headline"](tuned)}
