import json

import pytest

from experiments.benchmarks.throughput import main, our_windows, steady, their_windows

# As open_clip_train 3.3 prints it, a line at the first step and every fourth after it.
THEIRS = """\
2026-01-01,00:00:00 | INFO | Start epoch 0
2026-01-01,00:00:02 | INFO | Train Epoch: 0 [  64/2048 (3%)] Data (t): 1.500 Batch (t): 2.000, 32.0000/s, \
32.0000/s/gpu LR: 0.000050 Logit Scale: 14.286 Contrastive_loss: 4.1589 (4.1589) Loss: 4.1589 (4.1589)
2026-01-01,00:00:03 | INFO | Train Epoch: 0 [ 320/2048 (16%)] Data (t): 0.100 Batch (t): 0.250, 512.000/s, \
512.000/s/gpu LR: 0.000250 Logit Scale: 14.285 Contrastive_loss: 4.1500 (4.1545) Loss: 4.1500 (4.1545)
2026-01-01,00:00:07 | INFO | Train Epoch: 0 [2048/2048 (100%)] Data (t): 0.000 Batch (t): 0.125, 512.000/s, \
512.000/s/gpu LR: 0.000000 Logit Scale: 14.285 Contrastive_loss: 4.1400 (4.1497) Loss: 4.1400 (4.1497)
"""


def test_their_log_is_read_as_means_over_the_steps_between_lines():
    assert their_windows(THEIRS, 64) == [(64, 2.0, 1.5), (256, 1.0, 0.4), (1728, pytest.approx(27 * 0.125), 0.0)]


def test_our_log_is_read_as_means_over_the_steps_between_lines():
    lines = (
        {"step": 4, "pairs_per_second_per_rank": 50.0, "share_of_time_waiting_for_data": 0.5, "epoch": 0.5},
        {"step": 8, "pairs_per_second_per_rank": 100.0, "share_of_time_waiting_for_data": 0.0, "epoch": 1.0},
        {"step": 8, "validation/loss": 1.0},
    )
    assert our_windows("\n".join(map(json.dumps, lines)), 400) == [(200, 4.0, 2.0), (200, 2.0, 0.0)]


def test_windows_that_begin_during_the_warm_up_are_left_out():
    windows = their_windows(THEIRS, 64)
    assert steady(windows) == []
    assert steady([*windows, *windows]) == windows


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--rounds", "x"], ["--workloads", "none"], ["--nothing"]])
def test_what_the_user_can_mend_is_one_line_and_status_2(arguments, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
