"""`run.py study`: a small grid on real glyphs, in processes that are killed and started again."""

import dataclasses
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_study

from experiments.clip.cli.options import Loss
from experiments.clip.cli.parser import as_words, parse
from experiments.clip.errors import UserError
from experiments.clip.run import main
from experiments.clip.study import grid as study_grid
from experiments.clip.study.grid import STUDIES, Cell
from experiments.clip.study.runner import (
    best_settings,
    cell_hash,
    curves_path,
    largest_difference,
    planned,
    read_curves,
    read_rows,
    study_rows,
)
from experiments.clip.training.checkpoint import latest_checkpoint

RESULTS = Path(study_grid.__file__).parent / "results" / "study.csv"
PROGRAM = Path(small_study.__file__)
TRAININGS = 6


class Place:
    """A table of results and the folder beside it."""

    def __init__(self, root, cache):
        self.results, self.out, self.cache = root / "study.csv", root / "out", cache

    def words(self, *more):
        return ["study", "--results", self.results, "--out", self.out, "--cache", self.cache, *more]

    def start(self, *more):
        command = [sys.executable, PROGRAM, *self.words(*more)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )

    def here(self, *more):
        return main(list(map(str, self.words(*more))))


def finish(process):
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output


def numbers(results):
    """What must be equal wherever and however it was computed."""
    return {own: row | {"seconds": "", "options": ""} for own, row in read_rows(results).items()}


@pytest.fixture(scope="module")
def finished(glyph_cache, tmp_path_factory):
    """The grid, run by two processes at once."""
    place = Place(tmp_path_factory.mktemp("finished"), glyph_cache)
    outputs = [finish(process) for process in (place.start(), place.start())]
    assert sum(output.count("trained    ") for output in outputs) == TRAININGS
    return place


@pytest.fixture
def copied(finished, tmp_path):
    """The same, to be spoiled."""
    place = Place(tmp_path, finished.cache)
    shutil.copy(finished.results, place.results)
    shutil.copy(curves_path(finished.results), curves_path(place.results))
    shutil.copytree(finished.out, place.out)
    return place


@pytest.fixture
def small_grid():
    kept = [(own, dict(own)) for own in (study_grid.STUDIES, study_grid.REFERENCES)]
    small_study.install()
    yield
    for own, before in kept:
        own.clear()
        own.update(before)


def test_two_processes_share_the_grid(finished, small_grid):
    assert len(finished.results.read_text().splitlines()) == 1 + TRAININGS
    rows, curves = read_rows(finished.results), read_curves(finished.results)
    assert set(rows) == set(curves) == {each.hash for each in planned(STUDIES)}
    assert not list(finished.out.glob("cells/*"))
    (reference,) = finished.out.glob("references/poor-*")
    assert [path.name for path in reference.iterdir()] == ["model"]
    for own, row in rows.items():
        assert (row["samples_trained"], row["fraction"], row["captions"]) == ("600", "1", "swapped")
        assert float(row["gflops"]) > 0 and float(row["seconds"]) > 0 and 0 <= float(row["test_top1"]) <= 1
        assert [(line["step"], line["samples_trained"]) for line in curves[own]] == [("10", "300"), ("20", "600")]
        assert curves[own][-1]["validation_top1"] == row["validation_top1"]
        sides = [float(row[f"variance_of_losses/{side}"]) for side in ("image", "text")]
        assert float(row["variance_of_losses"]) == pytest.approx(sum(sides) / 2, rel=1e-6)
        assert bool(row["variance_of_excess"]) == bool(row["reference"])
    # A training in two studies is run once, and has each study's own labels.
    assert [row["setting"] for row in study_rows("steered", finished.results)] == ["shipped", ""]
    assert [row["reference"] for row in study_rows("steered", finished.results)] == ["shipped", "poor"]


def test_a_line_repeats_its_training(finished, small_grid):
    for each in planned(STUDIES):
        row = read_rows(finished.results)[each.hash]
        options = parse(["train", *shlex.split(row["options"])])
        assert as_words(options) == shlex.split(row["options"])
        if each.cell.reference:
            assert options.loss.reference == next(finished.out.glob("references/poor-*/model"))
            options = dataclasses.replace(options, loss=each.cell.train.loss)
        assert options == each.cell.train


def test_killed_anywhere_and_started_again_it_has_the_same_lines(finished, tmp_path):
    place = Place(tmp_path, finished.cache)
    for kills in range(3):
        process = place.start()
        while process.poll() is None:
            under_way = [path for path in place.out.glob("*/*/checkpoints") if latest_checkpoint(path) is not None]
            if len(read_rows(place.results)) >= 2 * kills and under_way:
                break
            time.sleep(0.01)
        process.kill()
        process.communicate()
    finish(place.start())
    assert any(not row["seconds"] for row in read_rows(place.results).values())  # one went on from its checkpoint
    assert numbers(place.results) == numbers(finished.results)
    assert len(place.results.read_text().splitlines()) == 1 + TRAININGS
    assert read_curves(place.results) == read_curves(finished.results)
    assert not list(place.out.glob("cells/*"))


def test_a_signal_or_the_end_of_its_time_keeps_the_state(glyph_cache, tmp_path):
    place = Place(tmp_path, glyph_cache)
    process = place.start("--only", "methods")
    while process.poll() is None and not list(place.out.glob("cells/*/checkpoints/step-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == os.EX_TEMPFAIL, errors
    assert "go on with: python experiments/clip/run.py study" in errors
    output = finish(place.start("--only", "methods", "--seconds", "0.5"))
    assert "from its checkpoint" in output
    assert re.search(r"the 0.5 seconds are over, \d trainings left", output)


def test_a_torn_line_is_mended(copied, finished, small_grid, capsys):
    text = copied.results.read_text()
    copied.results.write_text(text[:-30])
    assert len(read_rows(copied.results)) == TRAININGS - 1
    assert copied.here() == 0
    assert capsys.readouterr().out.count("trained    ") == 1
    assert numbers(copied.results) == numbers(finished.results)
    assert len(copied.results.read_text().splitlines()) == 1 + TRAININGS
    copied.results.write_text(text.replace(",swapped,", ",", 1))
    assert copied.here("--dry-run") == 2
    assert re.search(r"study.csv line 2 has \d+ fields, not \d+: remove that line", capsys.readouterr().err)
    copied.results.write_text("study,hash\n")
    assert copied.here("--dry-run") == 2
    assert "has the columns of another version: move it away" in capsys.readouterr().err


def test_a_dry_run_says_what_is_left_and_stale(copied, small_grid, monkeypatch, capsys):
    lines = copied.results.read_text().splitlines(keepends=True)
    copied.results.write_text("".join(line for line in lines if not line.startswith("references")))
    assert copied.here("--dry-run") == 0
    shown = capsys.readouterr().out
    assert re.search(r"references\W+1\W+0\W+1\W", shown)
    assert re.search(r"methods\W+4\W+4\W+0\W", shown)
    assert "stale" not in shown
    monkeypatch.setitem(study_grid.STUDIES, "methods", lambda: list(small_study.methods())[:2])
    assert copied.here("--dry-run") == 0
    assert re.search(r"stale\W+2\W", capsys.readouterr().out)
    assert [row["seed"] for row in study_rows("methods", copied.results)] == ["0", "0"]


def test_a_line_that_was_falsified_fails_the_check(copied, small_grid, capsys):
    assert copied.here("--check", "--only", "steered", "--seed", "1") == 0
    shown = capsys.readouterr().out
    assert "chosen by --seed 1" in shown
    assert len(re.findall(r"here, 0\.\d{4} there: within ±", shown)) == 2
    own = re.search(r"check +(\w{16}) ", shown)[1]
    row = read_rows(copied.results)[own]
    copied.results.write_text(copied.results.read_text().replace(f",{row['test_top1']},", ",0.9,"))
    assert copied.here("--check", "--only", "steered", "--seed", "1") == 2
    assert re.search(rf"--check {own} .*test_top1 .* 0\.9000 there: outside ±", capsys.readouterr().err)
    assert not list(copied.out.glob("check-*"))


def test_a_repetition_may_differ_by_chance_alone():
    half, source = largest_difference(0.2, [0.2], 2500)
    assert half == pytest.approx(1.96 * (2 * 0.2 * 0.8 / 2500) ** 0.5, rel=1e-3)
    assert source == "the binomial variance of 2500 samples"
    half, source = largest_difference(0.2, [0.1, 0.2, 0.3], 2500)
    assert half == pytest.approx(4.302653 * 2**0.5 * 0.1, rel=1e-6)  # t of 2 degrees of freedom
    assert source == "the spread over 3 seeds"
    assert largest_difference(0.0, [0.0, 0.0], 100)[0] > 0


def test_every_cell_of_the_grid_is_a_training_that_the_command_line_gives():
    # Of those that differ in their seed alone, one: a parser takes 40 ms.
    trainings = (dataclasses.replace(each.cell.train, seed=7) for each in planned(STUDIES))
    for words, train in {tuple(as_words(train)): train for train in trainings}.items():
        assert parse(["train", *words]) == train


def test_budgets_are_whole_passes_and_called_what_they_are():
    setting = next(iter(study_grid.SETTINGS["openclip"].values()))
    with pytest.raises(ValueError, match=r"epochs=2\.5 of lr=0\.0005 on a share 1 are 2\.5 passes"):
        study_grid.training(setting, "clean", epochs=2.5)
    assert study_grid.training(setting, "clean", epochs=2.5, fraction=0.5).optimization.epochs == 5
    labels = {
        each.cell.setting: each.cell.train for each in planned(STUDIES) if each.cell.setting.startswith("epochs=")
    }
    assert len(labels) >= 4
    assert all(train.optimization.epochs == int(label.removeprefix("epochs=")) for label, train in labels.items())
    budgets = {int(row["samples_trained"]) for row in read_rows(RESULTS).values() if row["setting"] == "epochs=1"}
    assert budgets == {study_grid.PAIRS_SEEN // study_grid.EPOCHS}


def test_tuned_settings_are_the_best_of_the_committed_results():
    """All settings were tried, six of most methods, and the best one was chosen by the validation split alone."""
    rows = [row for name in ("tuning", "tuning-more") for row in study_rows(name, RESULTS)]
    assert all(row["seed"] == "0" for row in rows)
    best = {(captions, method): setting for (captions, method, _), setting in best_settings(rows).items()}
    for captions, method in study_grid.TUNED:
        tried = {row["setting"] for row in rows if (row["captions"], row["method"]) == (captions, method)}
        more = {"distillation": 16, "drrho-distillation": 16, "fastclip-v3": 12, "drrho-learned": 9, "two-level": 9}
        more |= {"drrho-chi-square": 10, "drrho-cvar": 8}
        assert tried == set(study_grid.SETTINGS[method]) and len(tried) == more.get(method, 6)
    assert {key: best[key] for key in study_grid.TUNED} == study_grid.TUNED
    of_scored = study_rows("tuning-scored", RESULTS)
    best = {(captions, method): setting for (captions, method, _), setting in best_settings(of_scored).items()}
    assert {key: best[key] for key in study_grid.TUNED_SCORED} == study_grid.TUNED_SCORED
    assert best_settings(study_rows("tuning-longer", RESULTS)) == study_grid.TUNED_LONGER
    under = best_settings(study_rows("tuning-references", RESULTS))
    assert {key: under[key] for key in study_grid.TUNED_REFERENCES} == study_grid.TUNED_REFERENCES


def test_a_hash_is_that_of_all_that_the_result_depends_on():
    cell = next(iter(STUDIES["tuning"]()))
    train = cell.train
    own = cell_hash(cell)
    for same in (
        dataclasses.replace(train, out=Path("elsewhere"), logs=()),
        dataclasses.replace(train, data=dataclasses.replace(train.data, cache=Path("elsewhere"))),
    ):
        assert cell_hash(Cell("another label", same, "setting")) == own
    steered = dataclasses.replace(train, loss=Loss())
    others = [
        *(dataclasses.replace(train, **{name: value}) for name, value in (("seed", 9), ("fraction", 0.5))),
        dataclasses.replace(train, data=dataclasses.replace(train.data, captions="clean")),
        dataclasses.replace(train, optimization=dataclasses.replace(train.optimization, lr=3e-4)),
        steered,
    ]
    hashes = {cell_hash(Cell("", other)) for other in others}
    hashes |= {cell_hash(Cell("", steered, reference=name)) for name in study_grid.REFERENCES}
    assert len({own, *hashes}) == 1 + len(others) + len(study_grid.REFERENCES)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--only", "nosuch"], "--only nosuch is no study: choose of tuning"),
        (["--dry-run", "--check"], "--dry-run and --check are two things"),
        (["--seed", "1"], "--seed 1 has no part in this run: it is for --check"),
        (["--seconds", "0"], "--seconds must be positive, got 0"),
        (["--check", "--seconds", "9"], r"--seconds 9\.0 has no part"),
    ],
)
def test_options_that_would_be_ignored_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        parse(["study", *words])
