"""What a person at the terminal sees and may do."""

import os
import signal

import pytest

from experiments.clip.cli.terminal import console, progress_bar, stop_on_signal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_is_noted_and_the_second_one_is_at_once(number):
    before = signal.getsignal(number)
    with stop_on_signal() as stop:
        assert stop() == 0
        os.kill(os.getpid(), number)
        assert stop() == number
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
            signal.pause()
    assert signal.getsignal(number) is before


def test_a_bar_shows_how_much_is_done():
    with console.capture() as shown, progress_bar("reading") as advance:
        advance(3, 10, "loss 0.5")
    assert "reading" in shown.get() and "3/10" in shown.get() and "loss 0.5" in shown.get()
