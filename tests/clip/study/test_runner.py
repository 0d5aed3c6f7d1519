"""`run.py study`: a small grid on real glyphs, in processes that are killed and started again."""

import dataclasses
import os
import re
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
import small_study

from experiments.clip.cli.parser import as_words
from experiments.clip.errors import UserError
from experiments.clip.run import main, parse
from experiments.clip.study import grid as study_grid
from experiments.clip.study import runner
from experiments.clip.study.grid import STUDIES, Cell, TunedKey
from experiments.clip.study.options import Study
from experiments.clip.study.planning import planned_trainings
from experiments.clip.study.results import FIELDS, curves_path, read_curves, read_rows, study_rows, write_training
from experiments.clip.study.runner import largest_difference
from experiments.clip.study.settings import SETTINGS
from experiments.clip.study.tuned import tuned_path
from experiments.clip.training.checkpoint import latest_checkpoint
from tests.clip.launched import Launched

PROGRAM = Path(small_study.__file__)
TRAININGS = 6


class Place:
    """A table of results and the folder beside it."""

    def __init__(self, root, cache):
        self.results, self.out, self.cache = root / "study.csv", root / "out", cache

    def words(self, *more):
        return ["study", "--results", self.results, "--out", self.out, "--cache", self.cache, *more]

    def start(self, *more):
        return Launched(*self.words(*more), program=PROGRAM)

    def here(self, *more):
        return main(list(map(str, self.words(*more))))


def finish(process):
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output


def has_a_checkpoint(place):
    """Whether a training is under way that would resume; its folder may go while it is looked into."""
    try:
        return any(latest_checkpoint(path) is not None for path in place.out.glob("*/*/checkpoints"))
    except FileNotFoundError:
        return False


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
def grid():
    """The grid, which a test may change: afterwards it is as before, order included."""
    kept = [(own, dict(own)) for own in (study_grid.STUDIES, study_grid.REFERENCES)]
    yield
    for own, before in kept:
        own.clear()
        own.update(before)


@pytest.fixture
def small_grid(grid):
    small_study.install()


@pytest.mark.slow
def test_two_processes_share_the_grid(finished, small_grid):
    assert len(finished.results.read_text().splitlines()) == 1 + TRAININGS
    rows, curves = read_rows(finished.results), read_curves(finished.results)
    assert set(rows) == set(curves) == {each.hash for each in planned_trainings(STUDIES, {})}
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
    assert [row["setting"] for row in study_rows("steered", finished.results, {})] == ["shipped", ""]
    assert [row["reference"] for row in study_rows("steered", finished.results, {})] == ["shipped", "poor"]


@pytest.mark.slow
def test_a_line_repeats_its_training(finished, small_grid):
    for each in planned_trainings(STUDIES, {}):
        row = read_rows(finished.results)[each.hash]
        options = parse(["train", *shlex.split(row["options"])])
        assert as_words(options) == shlex.split(row["options"])
        if each.cell.reference:
            assert options.loss.reference == next(finished.out.glob("references/poor-*/model"))
            options = dataclasses.replace(options, loss=each.cell.train.loss)
        assert options == each.cell.train


@pytest.mark.slow
def test_killed_anywhere_and_started_again_it_has_the_same_lines(finished, tmp_path):
    place = Place(tmp_path, finished.cache)
    for kills in range(3):
        process = place.start()
        while process.poll() is None:
            if len(read_rows(place.results)) >= 2 * kills and has_a_checkpoint(place):
                break
            time.sleep(0.01)
        process.kill()
        process.communicate()
    finish(place.start())
    assert any(not row["seconds"] for row in read_rows(place.results).values())  # one resumed from its checkpoint
    assert numbers(place.results) == numbers(finished.results)
    assert len(place.results.read_text().splitlines()) == 1 + TRAININGS
    assert read_curves(place.results) == read_curves(finished.results)
    assert not list(place.out.glob("cells/*"))


@pytest.mark.slow
def test_a_signal_or_the_end_of_its_time_keeps_the_state(glyph_cache, tmp_path):
    place = Place(tmp_path, glyph_cache)
    process = place.start("--only", "methods")
    while process.poll() is None and not list(place.out.glob("cells/*/checkpoints/step-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == os.EX_TEMPFAIL, errors
    assert "resume with: python experiments/clip/run.py study" in errors
    output = finish(place.start("--only", "methods", "--seconds", "0.5"))
    assert "from its checkpoint" in output
    assert re.search(r"the 0.5 seconds are over, \d trainings left", output)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["_train", "_row"])
def test_a_signal_beside_training_ends_the_study_at_once(part, finished, tmp_path, small_grid, monkeypatch, capsys):
    """While pairs are prepared, or a finished training is scored: no step will ask whether a signal came."""
    place, after = Place(tmp_path, finished.cache), []

    def signaled(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        after.append("went on")

    monkeypatch.setattr(runner._StudyRunner, part, signaled)
    assert place.here("--only", "methods") == os.EX_TEMPFAIL
    assert "stopped by SIGTERM; what was finished is kept; resume with" in capsys.readouterr().err
    assert not after
    monkeypatch.undo()
    assert place.here("--only", "methods") == 0
    assert ("from its checkpoint" in capsys.readouterr().out) == (part == "_row")


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_dry_run_says_what_is_left_and_stale(copied, small_grid, capsys):
    lines = copied.results.read_text().splitlines(keepends=True)
    copied.results.write_text("".join(line for line in lines if not line.startswith("references")))
    assert copied.here("--dry-run") == 0
    shown = capsys.readouterr().out
    assert re.search(r"references\W+1\W+0\W+1\W", shown)
    assert re.search(r"methods\W+4\W+4\W+0\W", shown)
    assert "stale" not in shown
    study_grid.STUDIES["methods"] = lambda _: list(small_study.methods({}))[:2]
    assert copied.here("--dry-run") == 0
    assert re.search(r"stale\W+2\W", capsys.readouterr().out)
    assert [row["seed"] for row in study_rows("methods", copied.results, {})] == ["0", "0"]


@pytest.mark.slow
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


def test_what_uses_a_tuned_setting_is_due_when_the_last_of_its_tuning_is_done(grid, tmp_path, monkeypatch):
    settings, score, order = SETTINGS["openclip"][:2], {"lr=0.0005": 0.1, "lr=0.001": 0.2}, []

    def tuning(_):
        for setting in settings:
            yield Cell("openclip", small_study.training(setting.loss, seed=round(1e4 * setting.lr)), setting.name)

    def headline(tuned):
        if (setting := tuned.get(TunedKey("tuning", "swapped", "openclip"))) is not None:
            yield Cell("openclip", small_study.training(setting.loss), f"tuned {setting.name}")

    def train(self, each, folder, stop, model=None):
        folder.mkdir(parents=True)
        order.append(each.cell.setting)
        assert tuned_path(results).exists() == (len(order) > len(settings))
        row = dict.fromkeys(FIELDS, "0") | {"hash": each.hash, "validation_top1": str(score.get(each.cell.setting, 0))}
        write_training(results, row, [])

    results = tmp_path / "study.csv"
    STUDIES.clear()
    STUDIES.update({"tuning": tuning, "headline": headline})
    monkeypatch.setattr(runner._StudyRunner, "_run", train)
    with pytest.raises(UserError, match=r"--only headline uses tuned settings, of which .*study.csv has none yet: run"):
        runner.run(Study(results, tmp_path / "out", tmp_path, only=("headline",)))
    runner.run(Study(results, tmp_path / "out", tmp_path))
    assert order == ["lr=0.0005", "lr=0.001", "tuned lr=0.001"]
    runner.run(Study(results, tmp_path / "out", tmp_path, only=("headline",)))
    assert len(order) == 3


def test_a_dry_run_writes_nothing_and_names_what_is_not_tuned(small_grid, glyph_cache, tmp_path, capsys):
    STUDIES["headline"] = lambda tuned: ()
    runner.run(Study(tmp_path / "study.csv", tmp_path / "out", glyph_cache, dry_run=True))
    assert "their settings are not tuned yet: headline" in " ".join(capsys.readouterr().out.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words, message",
    [
        (["--only", "nosuch"], "--only nosuch is no study of --data glyphs: choose of tuning"),
        (["--dry-run", "--check"], "--dry-run and --check are two things"),
        (["--seed", "1"], "--seed 1 has no part in this run: it is for --check"),
        (["--seconds", "0"], "--seconds must be positive, got 0"),
        (["--check", "--seconds", "9"], r"--seconds 9\.0 has no part"),
    ],
)
def test_options_that_would_be_ignored_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        runner.run(parse(["study", *words]))
