"""Options, patterns and files out of all proportion: one line and status 2, in seconds and little memory."""

import json

import pytest

from experiments.clip.run import main

LONG = "9" * 5000
CASES = {
    "a seed of 31 digits": (["train", "--seed", "1" + "0" * 30], "--seed must be below 2^63, got 1"),
    "a batch of 31 digits": (["train", "--batch-size", "1" + "0" * 30], "--batch-size must be below 2^63"),
    "a negative number of 31 digits": (["train", "--seed", "-1" + "0" * 30], "--seed must be below 2^63"),
    "a number of 5,000 digits": (["train", "--seed", LONG], "--seed"),
    "NUL in a path": (["train", "--out", "a\0b"], r"--out cannot hold a NUL character, got 'a\x00b'"),
    "NUL among paths": (["train", "--catalog", "c", "--tasks", "a", "b\0"], "--tasks cannot hold a NUL character"),
    "NUL in a preset": (["train", "--preset", "a\0"], "no preset is called"),
    "NUL in a configuration": (["train", "--config", "a\0"], "--config a"),
    "made-up pairs": (["catalog", "synthetic:1000000000000"], "have more than 10000000000 samples"),
    "made-up pairs of 5,000 digits": (["catalog", f"synthetic:{LONG}"], "have more than 10000000000 samples"),
    "made-up pixels": (["catalog", "synthetic:5:1000000"], "have more than 10000 pixels"),
    "no made-up pair": (["catalog", "synthetic:0"], "must be synthetic:SAMPLES"),
    "a range of 10^11": (["catalog", "x/{0..100000000000}.tar"], "stand for 1e+11 names, more than 5000000"),
    "ranges of ranges": (["catalog", "x/" + "{0..999}" * 9], "stand for 1e+27 names"),
    "lists of lists": (["catalog", "x/" + "{a,b}" * 300], "stand for 2.04e+90 names"),
    "a range of 5,000 digits": (["catalog", f"x/{{0..{LONG}}}.tar"], "do not match"),
    "a mistyped option": (["train", "--epohcs", "3"], "Unrecognized options: --epohcs, 3 (nearest: --epochs)"),
    "a mistyped option with a value": (["train", "--epohcs=3"], "(nearest: --epochs)"),
    "a mistyped choice": (["train", "--method", "drho"], "got 'drho' (nearest: drrho)"),
    "a mistyped command": (["trian"], "no command is called 'trian' (nearest: train)"),
    "a mistyped preset": (
        ["train", "--preset", "drrho-dfn"],
        "no preset is called 'drrho-dfn' (nearest: drrho-dfn192m)",
    ),
    "a mistyped model": (["train", "--model", "VIT-B32"], "no model is called 'VIT-B32' (nearest: ViT-B-32, "),
    "a mistyped tag": (
        ["train", "--model", "ViT-B-32", "--pretrained", "opnai"],
        "no tag (nearest: openai) of ViT-B-32",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_out_of_proportion_or_mistyped_is_one_line(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, message = CASES[name]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("run.py: error: ") and said.count("\n") == 1
    assert message in said and all(each.isprintable() for each in said[:-1]) and len(said) < 1500


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, '{"seed": ' * 50_000 + "1" + "}" * 50_000, '{"seed": 1' + "0" * 30 + "}", '{"out": "a\\u0000b"}'],
    ids=["deep", "deep objects", "seed", "NUL"],
)
def test_a_configuration_out_of_proportion_is_one_line(content, capsys, tmp_path):
    (tmp_path / "config.json").write_text(content)
    assert main(["train", "--config", str(tmp_path / "config.json")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("run.py: error: ") and said.count("\n") == 1 and len(said) < 700


def test_names_that_would_steer_a_terminal_are_shown_escaped(capsys, tmp_path):
    """In an error, and in what a command prints."""
    folder = tmp_path / "\x1b]0;owned\x07\x1b[31m[bold]"
    assert main(["evaluate", str(folder)]) == 2
    assert main(["catalog", "synthetic:3", "--out", str(folder)]) == 0
    shown = capsys.readouterr()
    for text in (shown.err, shown.out):
        assert "\\x1b]0;owned\\x07\\x1b[31m[bold]" in text.replace("\n", "") and "\x1b" not in text
    assert json.loads((folder / "catalog.json").read_text())["samples"] == 3
