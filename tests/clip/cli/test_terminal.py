"""What a person at the terminal sees."""

from experiments.clip.cli.terminal import console, progress_bar


def test_a_bar_shows_how_much_is_done():
    with console.capture() as shown, progress_bar("reading") as advance:
        advance(3, 10, "loss 0.5")
    assert "reading" in shown.get() and "3/10" in shown.get() and "loss 0.5" in shown.get()


def test_texts_are_shown_as_they_are_and_do_not_steer():
    with console.capture() as shown, progress_bar("[red]\x1b[31mtask") as advance:
        advance(1, 1)
        console.print("[bold]wds[/bold] :smile: \x1b[2J\x07", "two\nlines")
    assert "[bold]wds[/bold] :smile: \\x1b[2J\\x07 two\nlines" in shown.get()
    assert "[red]\\x1b[31mtask" in shown.get()
    assert all(line.isprintable() for line in shown.get().splitlines())


def test_a_long_line_is_not_cut_in_a_file():
    line = "validation" + " glyph-script acc1 0.1234," * 30
    with console.capture() as shown:
        console.print(line)
    assert shown.get() == f"{line}\n"


def test_what_had_nothing_to_do_shows_no_bar():
    with console.capture() as shown, progress_bar("reading"):
        pass
    assert shown.get() == ""
