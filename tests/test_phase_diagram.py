"""The figures of where steering pays: their marks are the results' numbers, and the page has their tables."""

from pathlib import Path

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest

from experiments.linear.bilinear import pays_from, predicted
from experiments.linear.phase import ETAS, MODELS, SIZES, Cell
from experiments.linear.phase_analysis import gain, load, load_towers, strength, verdict
from paper_figures import phase_diagram, style
from paper_figures.phase_points import points
from paper_figures.study_results import NotMeasured, Results

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def measured():
    return load(phase_diagram.LINEAR)


def marks(axes):
    """Height and color of each dot."""
    return [
        (float(dot.get_offsets()[0, 1]), matplotlib.colors.to_hex(dot.get_facecolor()[0]))
        for dot in axes.collections
        if len(dot.get_offsets()) == 1
    ]


def test_dots_are_cells_with_their_verdicts(measured):
    figure = style.styled(lambda: phase_diagram.draw_diagram(measured, points()))
    above, below = figure.axes
    cells = [errors for cell, errors in measured.items() if cell.signal == phase_diagram.SHOWN]
    colors = {sign: matplotlib.colors.to_hex(color) for sign, color in phase_diagram.COLORS.items()}
    assert marks(above) == [(pytest.approx(strength(errors)), colors[verdict(gain(errors))]) for errors in cells]
    assert {color for _, color in marks(above)} >= {colors[1], colors[-1]}
    assert marks(below) == [(pytest.approx(point.gain.mean), colors[verdict(point.gain)]) for point in points()]
    x, y = above.lines[0].get_data()
    np.testing.assert_allclose(y, pays_from(1 - np.asarray(x)))
    assert figure.get_size_inches()[0] == style.COLUMN


def test_lines_are_means_and_dashes_are_predicted(measured):
    figure = style.styled(lambda: phase_diagram.draw_errors(measured, load_towers(phase_diagram.TOWERS)))
    noise = figure.axes[0]
    cells = [Cell(phase_diagram.SHOWN, eta, SIZES[-2], 600) for eta in ETAS]
    (twin,) = [line for line in noise.lines if line.get_label() == "no reference"]
    np.testing.assert_allclose(twin.get_ydata(), [measured[cell]["twin"].mean() for cell in cells])
    dashed = [line.get_ydata() for line in noise.lines if line.get_linestyle() == "--"]
    for method, found in zip(("twin", "steered"), dashed, strict=True):
        lines = [getattr(predicted(MODELS[phase_diagram.SHOWN], *cell[1:]), method) for cell in cells]
        np.testing.assert_allclose(found, lines)


@pytest.mark.slow
def test_figures_are_the_same_each_time_and_committed(tmp_path):
    first, second = (phase_diagram.write(Results(), tmp_path / part) for part in "12")
    assert [path.name for path in first] == [
        "phase_diagram.png",
        "phase_diagram.pdf",
        "phase_errors.png",
        "phase_errors.pdf",
    ]
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()
        assert (ROOT / "paper_figures" / a.name).is_file(), "run: make figures"
    assert matplotlib.image.imread(first[0]).shape[1] == style.COLUMN * 200


def test_without_the_study_nothing_is_drawn(tmp_path):
    with pytest.raises(NotMeasured, match="study --only"):
        phase_diagram.write(Results(tmp_path / "none.csv"), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_pages_numbers_are_those_of_the_results():
    page = (ROOT / "experiments" / "linear" / "phase.md").read_text()
    for table in phase_diagram.tables(Results()).split("\n\n"):
        assert table in page, "run: python paper_figures/phase_diagram.py --tables"
