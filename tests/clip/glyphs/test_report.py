"""The demo's report, from the committed results of one."""

import dataclasses
import json
from pathlib import Path

import pytest

from experiments.clip.glyphs import report

RESULTS = Path(__file__).parents[3] / "paper_figures" / "results" / "glyph_demo.json"


@pytest.fixture(scope="module")
def result():
    return report.DemoResult(**json.loads(RESULTS.read_text()))


def test_the_page_has_a_row_for_every_measure_and_for_every_setting_that_differs(result):
    page = report.page(result)
    for measure, value in report.rows(result.scores["steered"]).items():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {measure} |")]
        assert line.count("|") == 6 and f" {100 * value:.1f} |" in line
    lines = page.partition("| setting | unsteered | steered |")[2].splitlines()[2:]
    assert lines == [
        "| `reference` | none | yes |",
        "| `method` | fastclip | drrho |",
        "| `temperature` | 0.2 | 0.138 |",
    ]
    assert "A small run" not in page


def test_settings_that_differ_are_those_and_no_others():
    runs = {
        "unsteered": {"settings": {"model": "m", "lr": 1e-3, "reference": "", "lock": []}},
        "steered": {"settings": {"model": "m", "lr": 2e-3, "reference": "0f3a", "lock": [], "coefficient": 1.0}},
    }
    assert report.differing_settings(runs) == {
        "lr": {"unsteered": "0.001", "steered": "0.002"},
        "reference": {"unsteered": "none", "steered": "yes"},
        "coefficient": {"unsteered": "-", "steered": "1.0"},
    }


def test_a_small_run_is_said_to_be_one(result):
    quick = dataclasses.replace(result, options=result.options | {"quick": True})
    assert report.demo_table(quick).title == "Trained on swapped captions, a small run: 23635 pairs, 9 epochs"
    assert "A small run, 23635 pairs, 9 epochs: " in report.page(quick)


def test_the_table_has_a_column_for_every_model(result):
    table = report.demo_table(result)
    assert [column.header for column in table.columns][1:] == ["reference", "unsteered", "steered", "chance"]
    assert table.row_count == len(report.rows(result.scores["reference"])) + 3  # settings that differ
    known = report.chances(result.scores["reference"])
    assert known["naming top-1"] == pytest.approx(1 / 7144) and known["naming top-5"] == 5 * known["naming top-1"]


def test_curves_are_the_validations(result):
    accuracy, loss = report.draw_curves(result).axes
    for name, line in zip(result.runs, accuracy.lines, strict=False):
        history = result.runs[name]["history"]
        assert line.get_label() == name
        assert line.get_ydata() == pytest.approx([100 * record["naming_top1"] for record in history])
        seen = result.runs[name]["settings"]["epochs"] * result.pairs / 1000
        assert line.get_xdata()[-1] == pytest.approx(seen)
    assert accuracy.lines[-1].get_ydata()[0] == 100 * result.scores["reference"]["naming"]["top1"]
    assert len(loss.lines) == len(result.runs)
