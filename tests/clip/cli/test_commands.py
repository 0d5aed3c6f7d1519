"""The commands ``evaluate``, ``cache-reference`` and ``catalog``, as the entry calls them."""

import json
import shutil

import numpy as np
import pytest
from tars import pair, write_tar
from task_folders import (
    CLASSES,
    DATACOMP,
    TASKS,
    class_folders,
    classification,
    picture,
    retrieval,
    samples,
    write_catalog,
    write_task,
)

from experiments.clip.catalog.catalog import open_catalog
from experiments.clip.cli.options import SHIPPED_REFERENCE
from experiments.clip.evaluation.datacomp import AVERAGES
from experiments.clip.models.clip import new_model
from experiments.clip.models.export import export_model
from experiments.clip.run import main


def evaluate(*words):
    return main(["evaluate", str(SHIPPED_REFERENCE), *map(str, words)])


def test_a_catalog_says_what_it_holds(tmp_path, capsys):
    assert main(["catalog", "synthetic:20:32", "--out", str(tmp_path / "catalog"), "--workers", "0"]) == 0
    assert "20 pairs in 1 shards" in capsys.readouterr().out
    assert main(["catalog", str(tmp_path / "none.tar"), "--out", str(tmp_path / "other")]) == 2
    assert "none.tar" in capsys.readouterr().err


def test_damaged_shards_are_named_the_first_of_them(tmp_path, capsys):
    for number in range(8):
        path = write_tar(tmp_path / f"{number}.tar", [*pair(2 * number), *pair(2 * number + 1)])
        if number:
            path.write_bytes(path.read_bytes()[:-10_000])
    assert main(["catalog", str(tmp_path / "*.tar"), "--out", str(tmp_path / "catalog"), "--workers", "0"]) == 0
    output = capsys.readouterr().out
    assert "7 for damaged shard" in output
    assert all(f"damaged    {tmp_path}/{number}.tar: " in output for number in range(1, 6))
    assert "damaged    2 more shards" in output and "6.tar" not in output


def test_sources_are_joined_on_the_command_line_and_tables_name_their_columns(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "shards/0.tar", pair(0))
    write_tar(tmp_path / "more.tar", [*pair(1), *pair(2)])
    assert main(["catalog", "shards::more.tar", "synthetic:5:8", "--workers", "0"]) == 0
    assert "8 pairs in 3 shards" in capsys.readouterr().out
    assert len(open_catalog(tmp_path / "catalog").sources) == 3
    (tmp_path / "t.csv").write_text("path;en;de\na.png;x;y\nb.png;;z\n")
    words = ["catalog", "t.csv", "--image-key", "path", "--caption-key", "en", "de", "--separator", ";"]
    assert main([*words, "--workers", "0"]) == 0
    assert "2 pairs in 1 shards" in capsys.readouterr().out
    assert main(["catalog", "t.csv"]) == 2
    assert "name its own by --image-key, --caption-key and --separator" in capsys.readouterr().err
    assert main(["catalog", "more.tar", "--uid-key", "id"]) == 2
    assert "--uid-key id has no part in this run: it is for --uids" in capsys.readouterr().err


def test_a_catalog_says_what_may_help_where_more_is_left_out_than_there_is(tmp_path, capsys):
    members = [*pair(0), ("a.png", b""), ("a.alt", b"x"), ("b.png", b""), ("b.alt", b"x")]
    words = ["catalog", str(write_tar(tmp_path / "x.tar", members)), "--out", str(tmp_path / "c"), "--workers", "0"]
    assert main([*words, "--caption-key", "txt"]) == 0
    shown = capsys.readouterr().out
    assert "left out   2 for no caption" in shown and "more than there is: " in shown
    assert main([*words, "--caption-key", "txt", "alt"]) == 0
    assert "left out" not in capsys.readouterr().out


def test_a_subset_is_named_by_its_uids(tmp_path, capsys):
    np.save(tmp_path / "uids.npy", np.array([(0, 1)], np.dtype("u8,u8")))
    members = [m for n in range(3) for m in (*pair(n), (f"{n:05d}.json", b'{"uid": "%x"}' % n))]
    words = ["catalog", str(write_tar(tmp_path / "x.tar", members)), "--out", str(tmp_path / "c"), "--workers", "0"]
    assert main([*words, "--uids", str(tmp_path / "uids.npy")]) == 0
    shown = capsys.readouterr().out
    assert "1 pairs in 1 shards" in shown and "left out   2 for not in the subset" in shown


@pytest.mark.slow
def test_features_of_a_catalog_are_computed_once(tmp_path, capsys):
    assert main(["catalog", "synthetic:8:32", "--out", str(tmp_path / "catalog"), "--workers", "0"]) == 0
    words = ["cache-reference", "--catalog", str(tmp_path / "catalog"), "--out", str(tmp_path / "features")]
    words += ["--reference", str(SHIPPED_REFERENCE)]
    assert main(words) == 0
    assert "computed 8 rows" in capsys.readouterr().out
    assert main(words) == 0
    assert "reusing" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["cache-reference", "evaluate"])
def test_the_embedded_pairs_take_one_process(command, monkeypatch, capsys):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert main([command, *([str(SHIPPED_REFERENCE)] if command == "evaluate" else [])]) == 2
    assert "the embedded pairs take one process" in capsys.readouterr().err
    assert main(["prepare"]) == 2
    assert "this command takes one process, here are 2" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["evaluate", "nowhere"], ["cache-reference", "--reference", "nowhere"]])
def test_a_model_that_is_not_there_is_one_line(words, capsys):
    assert main(words) == 2
    assert "no model is called 'nowhere'" in capsys.readouterr().err


# --- evaluate: the embedded pairs -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_is_scored_on_held_out_glyphs(glyph_cache, tmp_path, capsys):
    words = ["--size", "small", "--cache", glyph_cache, "--out", tmp_path / "scores.json"]
    assert evaluate(*words, "--split", "validation") == 0
    shown = capsys.readouterr().out
    assert "naming top-1" in shown and "text to image R@10" in shown
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert f"{100 * scores['naming']['top1']:.1f}" in shown


def test_a_model_of_photographs_is_not_scored_on_names_of_characters(tmp_path, capsys):
    """Neither one of another architecture, nor one that a run has trained on a catalog."""
    export_model(new_model("glyph-micro", 0), tmp_path / "run" / "model")
    config = json.loads((tmp_path / "run" / "model" / "open_clip_config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps({"shards": {"catalog": "photographs"}}))
    shutil.copytree(tmp_path / "run" / "model", tmp_path / "photographs")
    config["model_cfg"]["vision_cfg"]["image_size"] = 64
    (tmp_path / "photographs" / "open_clip_config.json").write_text(json.dumps(config))
    weights = tmp_path / "run" / "epoch_1.pt"
    for words in (
        [tmp_path / "run" / "model"],
        [tmp_path / "photographs"],
        ["glyph-micro", "--weights", weights],
        ["ViT-B-32", "--weights", tmp_path / "openai.pt"],
    ):
        assert main(["evaluate", *map(str, words)]) == 2
        assert "was not trained on the embedded pairs" in capsys.readouterr().err


# --- evaluate: tasks and held-out pairs -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Tasks of every kind, beside the file that glyph-tasks writes, and held-out pairs."""
    folder = tmp_path_factory.mktemp("data")
    for name, write in TASKS.items():
        write(folder / "wds" / name)
    class_folders(folder)
    (folder / "wds" / "tasks.json").write_text("{}")
    write_catalog(folder)
    return folder


def all_of(data):
    """The words that a shell makes of ``--tasks wds/* val --val-data catalog``."""
    return ["--tasks", *sorted((data / "wds").iterdir()), data / "val", "--val-data", data / "catalog"]


def results(path):
    return {row["name"]: row for row in json.loads(path.read_text())["results"]}


def table(shown):
    """The rows of the table, by their names, up to the score."""
    lines = shown.splitlines()
    (head,) = [number for number, line in enumerate(lines) if line.split()[:3] == ["task", "samples", "main"]]
    return {line.split()[0]: line.split()[1:4] for line in lines[head + 1 :]}


def test_scores_are_printed_as_a_table_and_written(data, tmp_path, capsys):
    assert evaluate(*all_of(data), "--out", tmp_path / "scores.json", "--batch-size", "8") == 0
    found = results(tmp_path / "scores.json")
    name = f"{data.name}-val"
    assert found.keys() == {*TASKS, name, "held_out"}
    rows = table(capsys.readouterr().out)
    assert rows.keys() == found.keys()
    main_metrics = {name: row[1] for name, row in rows.items()}
    assert main_metrics == {
        "classification": "acc1",
        "multilabel": "mean_average_precision",
        "retrieval": "image_retrieval_recall@1",
        name: "acc1",
        "held_out": "loss",
    }
    for name, (samples_, metric, score) in rows.items():
        assert (int(samples_), f"{found[name]['metrics'][metric]:.4f}") == (found[name]["samples"], score)


@pytest.mark.slow
def test_workers_and_what_is_there_already(data, tmp_path, capsys):
    out = tmp_path / "scores.json"
    assert evaluate(*all_of(data), "--out", out, "--workers", "2") == 0
    expected = out.read_text()
    partial = json.loads(expected)
    partial["results"] = partial["results"][:3]
    partial["results"][0]["fingerprint"] = "of other data"
    out.write_text(json.dumps(partial))
    capsys.readouterr()
    assert evaluate(*all_of(data), "--out", out) == 0
    shown = capsys.readouterr().out
    assert shown.count("reusing the scores in") == 2
    assert results(out) == {row["name"]: row for row in json.loads(expected)["results"]}


@pytest.mark.slow
def test_scores_with_other_settings_are_refused(data, tmp_path, capsys):
    out, words = tmp_path / "scores.json", ["--tasks", data / "wds" / "classification"]
    assert evaluate(*words, "--out", out) == 0
    assert evaluate(*words, "--out", out, "--batch-size", "8") == 2
    assert "has scores with batch_size=64, now it is 8: choose another file" in capsys.readouterr().err
    for content in (b"", b"[]", b'{"settings": {}, "results": [{"name": "classification"}]}', b"[" * 10**5):
        out.write_bytes(content)
        assert evaluate(*words, "--out", out) == 2
        assert "is there and holds no scores" in capsys.readouterr().err
        assert out.read_bytes() == content


def test_precision_is_that_of_the_towers(data, tmp_path):
    for precision in ("float32", "bfloat16"):
        out = tmp_path / f"{precision}.json"
        assert evaluate("--val-data", data / "catalog", "--out", out, "--precision", precision) == 0
    exact, rounded = (
        results(tmp_path / f"{precision}.json")["held_out"]["metrics"]["loss"] for precision in ("float32", "bfloat16")
    )
    assert exact != rounded and rounded == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--tasks", "none"], "--tasks none is no folder"),
        (["--val-data", "none"], "none"),
        (["--tasks", "{data}/wds/tasks.json"], "names no folder"),
        (["--tasks", "{data}/wds/retrieval", "{data}/wds/../wds/retrieval"], "has 2 folders of one name"),
        (["--tasks", "{data}/wds/retrieval", "--datacomp"], "--tasks has no folder of vtab/caltech101, cifar10, "),
        (["--tasks", "{data}/wds/retrieval", "--out", "/proc/none/scores.json"], "cannot write"),
        (["--tasks", "{data}/wds/retrieval", "--size", "small"], "take the place of --data and its options"),
        (["--datacomp"], "--datacomp True has no part in this run: it is for --tasks"),
        (["--workers", "2"], "--workers 2 has no part in this run: it is for --tasks or --val-data"),
        (["--tasks", "{data}/wds/retrieval", "--skip-limit", "0.5"], "it is for --val-data"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_is_loaded(words, message, data, capsys):
    assert main(["evaluate", "no-model", *(word.format(data=data) for word in words)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def folder_of(entry):
    """What DataComp's script, or CLIP_benchmark, calls the folder of a task."""
    known = {"Flickr": "wds_flickr30k", "MSCOCO": "wds_mscoco_captions", "WinoGAViL": "wds_winogavil_test"}
    return known.get(entry.name) or f"wds_{entry.key.removeprefix('fairness/').replace('/', '-')}_test"


@pytest.mark.slow
def test_all_of_datacomps_tasks_have_its_averages(tmp_path, capsys):
    wds = tmp_path / "wds"
    for number, entry in enumerate(AVERAGES["Average"]):
        name = folder_of(entry)
        if name in DATACOMP:
            DATACOMP[name](wds)
        elif entry.name == "MSCOCO":
            retrieval(wds / name)
        else:
            labels = [b"%d" % ((number + k) % len(CLASSES)) for k in range(4)]
            write_task(wds / name, [samples(labels, "cls", number, ("png",))])
    folders = sorted(wds.iterdir())
    assert evaluate("--tasks", *folders, "--datacomp", "--out", tmp_path / "scores.json") == 0
    shown = capsys.readouterr().out
    found = results(tmp_path / "scores.json")
    scores = {entry.key: found[folder_of(entry)]["metrics"][entry.main] for entry in AVERAGES["Average"]}
    averages = json.loads((tmp_path / "scores.json").read_text())["datacomp"]
    assert averages["Average"] == pytest.approx(sum(scores.values()) / 38)
    assert averages["ImageNet"] == scores["imagenet1k"]
    for name, value in averages.items():
        assert f"DataComp   {name:<22} {value:.4f}" in shown
    assert evaluate("--tasks", *folders[1:], "--datacomp") == 2
    assert "--tasks has no folder of cars: name the missing ones" in capsys.readouterr().err


def test_names_do_not_steer_the_terminal(tmp_path, capsys):
    folder = classification(tmp_path / "\x1b[31m[red]\r\x07tas\u202ek")
    out = tmp_path / "scores.json"
    assert evaluate("--tasks", folder, "--out", out) == 0
    (folder / "test" / "1.tar").unlink()
    (folder / "classnames.txt").write_text("\x1b]0;owned\x07\n" * 6)
    (folder / "zeroshot_classification_templates.txt").write_text("\x1b[2J{c} {\n")
    assert evaluate("--tasks", folder) == 2
    shown = "".join(capsys.readouterr())
    assert all(line.isprintable() for line in shown.splitlines())
    assert r"\x1b[31m[red]\r\x07tas\u202ek" in shown
    assert list(results(out)) == [r"\x1b[31m[red]\r\x07tas\u202ek"]


def test_a_damaged_image_ends_it_and_keeps_what_is_done(data, tmp_path, capsys):
    broken = write_task(tmp_path / "zz", [[*samples([b"1"], "cls"), ("b.png", picture(0)[:-99]), ("b.cls", b"1")]])
    out = tmp_path / "scores.json"
    assert evaluate("--tasks", data / "wds" / "classification", broken, "--out", out) == 2
    assert "b.png in" in capsys.readouterr().err
    assert list(results(out)) == ["classification"]


def test_advice_needs_what_the_unsteered_run_reaches_where_the_probe_is_too_short(glyph_cache, tmp_path, capsys):
    words = ["advise", "--model", "glyph-micro", "--cache", str(glyph_cache), "--epochs", "50"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "too short to tell" in out
    assert out.strip().splitlines()[-1].startswith("recommended: cannot tell: give --expected PERCENT")
    assert main([*words, "--epochs", "1"]) == 0
    assert "2 % of 150 pairs is not a step of 128" in capsys.readouterr().out


def test_advice_is_a_table_and_a_recommendation(glyph_cache, tmp_path, capsys):
    words = ["advise", "--cache", str(glyph_cache), "--expected", "3"]
    assert main([*words, "--out", str(tmp_path / "advice.json")]) == 0
    *table, last = capsys.readouterr().out.strip().splitlines()
    assert last.startswith("recommended: reference_model, ")
    assert any("chi-square" in line and " to " in line for line in table)
    stored = json.loads((tmp_path / "advice.json").read_text())
    assert last == f"recommended: {stored['recommended']}"
    best = max(stored["predictions"], key=lambda each: each["points"])
    assert best["how"]["select"] == "jest"  # 40 % of the captions are wrong
    assert stored["references"]["reference_model"]["unrecognized"] == pytest.approx(0.4, abs=0.15)
    assert main([*words, "--most-cost", "1"]) == 0
    assert "jest" not in capsys.readouterr().out


def test_advice_says_not_to_steer_by_a_reference_that_knows_nothing(tmp_path, capsys):
    export_model(new_model("glyph-micro", 0), tmp_path / "untrained/model")
    assert main(["catalog", "synthetic:1100:32", "--out", str(tmp_path / "c"), "--workers", "0"]) == 0
    words = ["advise", "--catalog", str(tmp_path / "c"), "--reference", str(tmp_path / "untrained/model")]
    assert main([*words, "--pairs", "1024", "--expected", "60", "--reference-score", "0.5"]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1] == "recommended: do not steer"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--catalog", "c"], "--catalog needs --reference"),
        (["--data", "icons"], "--data icons needs --reference"),
        (
            ["--reference", "a", "b", "--expected", "5", "--reference-score", "5"],
            "--reference-score has 1 values for 2",
        ),
        (["--expected", "0.15", "--probe-share", "0.1"], "--probe-share must be in (0, 0.02], got 0.1"),
        (["--reference-score", "5"], "it is for --expected"),
        (["--reference", "nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_what_is_wrong_with_a_question_for_advice_is_one_line(words, message, capsys):
    assert main(["advise", *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
