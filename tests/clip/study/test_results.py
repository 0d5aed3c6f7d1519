"""The tables of results, as processes that may be killed write and read them."""

import dataclasses

import pytest

from experiments.clip.cli.presets import STARTS
from experiments.clip.errors import UserError
from experiments.clip.study.grid import STUDIES, Cell
from experiments.clip.study.planning import cell_hash
from experiments.clip.study.results import (
    CURVE_FIELDS,
    FIELDS,
    curve_of,
    curves_path,
    read_curves,
    read_rows,
    study_rows,
    write_training,
)

GLYPHS = STARTS["glyphs"]


def line(own, **more):
    return dict.fromkeys(FIELDS, "1") | {"hash": own} | more


def curve(own, *tops):
    return [dict.fromkeys(CURVE_FIELDS, "") | {"hash": own, "step": str(k), "validation_top1": top} for k, top in tops]


def test_lines_are_read_as_they_were_written(tmp_path):
    results = tmp_path / "study.csv"
    assert read_rows(results) == read_curves(results) == {}
    write_training(results, line("a", options='--lr 1, "quoted"'), curve("a", (10, "0.1"), (20, "0.2")))
    write_training(results, line("b"), curve("b", (10, "0.3")))
    write_training(results, line("a", seed="9"), curve("a", (30, "0.9")))  # done already: nothing is added
    assert read_rows(results) == {"a": line("a", options='--lr 1, "quoted"'), "b": line("b")}
    assert read_curves(results) == {"a": curve("a", (10, "0.1"), (20, "0.2")), "b": curve("b", (10, "0.3"))}


def test_half_a_line_does_not_count_and_is_replaced(tmp_path):
    results = tmp_path / "study.csv"
    write_training(results, line("a"), curve("a", (10, "0.1")))
    write_training(results, line("b"), curve("b", (20, "0.3"), (10, "0.2")))
    results.write_text(results.read_text()[:-5])
    assert set(read_rows(results)) == {"a"} and set(read_curves(results)) == {"a", "b"}
    write_training(results, line("b"), curve("b", (10, "0.2"), (20, "0.3")))
    assert set(read_rows(results)) == {"a", "b"}
    assert read_curves(results)["b"] == curve("b", (10, "0.2"), (20, "0.3"))  # each once, in order of steps
    assert len(results.read_text().splitlines()) == 3


def test_a_line_or_table_of_another_shape_is_named(tmp_path):
    results = tmp_path / "study.csv"
    write_training(results, line("a"), [])
    results.write_text(results.read_text() + "1,2\n")
    with pytest.raises(UserError, match=rf"study.csv line 3 has 2 fields, not {len(FIELDS)}: remove that line"):
        read_rows(results)
    curves_path(results).write_text("hash,step\n")
    with pytest.raises(UserError, match=r"study_curves.csv has the columns of another version: move it away"):
        read_curves(results)


def test_rows_of_a_study_have_its_own_labels_and_order(tmp_path, monkeypatch):
    results = tmp_path / "study.csv"
    cells = [Cell("drrho", dataclasses.replace(GLYPHS, seed=seed), f"setting {seed}") for seed in range(3)]
    monkeypatch.setitem(STUDIES, "own", lambda _: reversed(cells))
    for cell in cells[:2]:
        write_training(results, line(cell_hash(cell), study="other", method="other", setting="other"), [])
    rows = study_rows("own", results, {})
    assert [(row["study"], row["method"], row["setting"]) for row in rows] == [
        ("own", "drrho", "setting 1"),
        ("own", "drrho", "setting 0"),
    ]


def test_a_curve_counts_pairs_by_steps_where_records_do_not():
    history = [{"step": 5, "naming_top1": 0.125}, {"step": 20, "naming_top1": 0.25, "samples_trained": 77}]
    found = curve_of(line("a", samples_trained="100"), history)
    assert [(row["step"], row["samples_trained"], row["validation_top1"]) for row in found] == [
        ("5", "25", "0.125"),
        ("20", "77", "0.25"),
    ]
    assert found[0]["variance_of_losses"] == ""
