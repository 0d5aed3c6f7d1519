"""Tuned settings are what the table of results gives, and are never lost."""

import json
from pathlib import Path

import pytest

from experiments.clip.errors import UserError
from experiments.clip.study import grid as study_grid
from experiments.clip.study.grid import STUDIES, TunedKey, tuning_of
from experiments.clip.study.planning import cell_hash
from experiments.clip.study.results import FIELDS, read_rows, study_rows, write_training
from experiments.clip.study.settings import SETTINGS
from experiments.clip.study.tuned import read_tuned, tuned_by_now, tuned_path, update_tuned, winners, write_tuned

RESULTS = Path(study_grid.__file__).parent / "results" / "study.csv"
OPENCLIP = TunedKey("tuning", "clean", "openclip")


def tuning_lines(scores):
    """Lines of the settings of OpenCLIP's method on clean captions, with these scores."""
    cells = [c for c in STUDIES["tuning"]({}) if c.method == "openclip" and c.train.data.captions == "clean"]
    return [
        dict.fromkeys(FIELDS, "0") | {"hash": cell_hash(cell), "validation_top1": str(score)}
        for cell, score in zip(cells, scores, strict=False)
    ]


def write(results, lines):
    for line in lines:
        write_training(results, line, [])


def test_the_committed_file_is_what_the_committed_results_give(tmp_path):
    results = tmp_path / "study.csv"
    write_tuned(results, winners(read_rows(RESULTS)))
    assert tuned_path(results).read_bytes() == tuned_path(RESULTS).read_bytes()


def test_all_settings_were_tried_and_the_best_was_chosen_by_the_validation_split():
    tuned = read_tuned(RESULTS)
    for name in ("tuning", "tuning-more", "tuning-scored", "tuning-references", "tuning-longer"):
        rows = study_rows(name, RESULTS, {})
        assert all(row["seed"] == "0" for row in rows)
        keys = [key for key in tuned if key.study == name]
        assert len(keys) == len({(row["captions"], row["method"], row["reference"]) for row in rows})
        for key in keys:
            own = [
                row
                for row in rows
                if (row["captions"], row["method"]) == (key.captions, key.method)
                and (not key.reference or row["reference"] == key.reference)
            ]
            best = max(float(row["validation_top1"]) for row in own)
            first = next(row["setting"] for row in own if float(row["validation_top1"]) == best)
            assert tuned[key].name == first


def test_of_most_methods_six_settings_were_tried():
    more = {"distillation": 16, "drrho-distillation": 16, "fastclip-v3": 12, "drrho-learned": 9, "two-level": 9}
    more |= {"drrho-chi-square": 10, "drrho-cvar": 8}
    rows = [row for name in ("tuning", "tuning-more") for row in study_rows(name, RESULTS, {})]
    tuned = read_tuned(RESULTS)
    for captions in study_grid.CAPTIONS:
        for method, settings in SETTINGS.items():
            tried = {row["setting"] for row in rows if (row["captions"], row["method"]) == (captions, method)}
            assert tried == {each.name for each in settings} and len(tried) == more.get(method, 6)
            assert TunedKey(tuning_of(method), captions, method) in tuned


def test_a_winner_is_written_when_the_last_setting_is_tried(tmp_path):
    results = tmp_path / "study.csv"
    lines = tuning_lines([0.1, 0.3, 0.2, 0.3, 0.1, 0.0])
    write(results, lines[:-1])
    assert update_tuned(results) == tuned_by_now(results) == {} and not tuned_path(results).exists()
    write(results, lines[-1:])
    assert read_tuned(results) == {}
    expected = {OPENCLIP: SETTINGS["openclip"][1]}  # the first of equals
    assert tuned_by_now(results) == expected and not tuned_path(results).exists()
    assert update_tuned(results) == read_tuned(results) == expected
    (entry,) = json.loads(tuned_path(results).read_bytes())
    assert entry == {
        **OPENCLIP._asdict(),
        "options": {"lr": 1e-3},
        "hash": lines[1]["hash"],
        "validation_top1": 0.3,
    }


def test_what_was_tuned_stays_until_the_table_decides_otherwise(tmp_path):
    results, more = tmp_path / "study.csv", tmp_path / "more.csv"
    write(results, tuning_lines([0.1, 0.3, 0.2, 0.0, 0.0, 0.0]))
    before = update_tuned(results)
    results.write_text("".join(results.read_text().splitlines(keepends=True)[:3]))
    assert update_tuned(results) == before == read_tuned(results)
    write(more, tuning_lines([0.1, 0.2, 0.3, 0.0, 0.0, 0.0]))
    more.replace(results)
    assert update_tuned(results) == {OPENCLIP: SETTINGS["openclip"][2]}


def test_a_setting_that_the_grid_no_longer_has_is_not_tuned(tmp_path):
    results = tmp_path / "study.csv"
    write(results, tuning_lines([0.1, 0.3, 0.2, 0.0, 0.0, 0.0]))
    update_tuned(results)
    text = tuned_path(results).read_text()
    for found, other in (('"lr": 0.001', '"lr": 0.123'), ('"openclip"', '"no such method"')):
        tuned_path(results).write_text(text.replace(found, other))
        assert read_tuned(results) == {}


@pytest.mark.parametrize("text", ["[", "[{}]", "3", '[{"study": "tuning"}]'])
def test_a_broken_file_is_named(tmp_path, text):
    tuned_path(tmp_path / "study.csv").write_text(text)
    with pytest.raises(UserError, match=r"study_tuned.json is not a file of tuned settings .*: remove it"):
        read_tuned(tmp_path / "study.csv")
