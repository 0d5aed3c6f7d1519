"""Training on several gloo ranks, started as torchrun starts them, against one process."""

import json
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from processes import needs_shards
from safetensors.torch import load_file
from task_folders import DATACOMP, TASKS, class_folders, samples, write_catalog, write_task

from experiments.clip.data.order import Order
from experiments.clip.models.clip import new_model
from experiments.clip.run import main
from experiments.clip.training.checkpoint import Checkpoint, latest_checkpoint
from experiments.clip.training.options import SHIPPED_REFERENCE
from tests.clip.launched import PROGRAM, Launched
from tests.clip.tars import image_bytes, write_tar

pytestmark = pytest.mark.slow  # real processes
OPTIONS = ("--model", "glyph-micro", "--size", "small", "--captions", "swapped", "--epochs", "11", "--batch-size", "32")
OPTIONS = (*OPTIONS, "--log-every", "1", "--validations", "1", "--lr", "5e-4", "--warmup", "20", "--ema", "0.9")
STEPS = 55  # five batches of the few glyphs an epoch


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launch(ranks, *arguments):
    """Start the program on that many ranks, as torchrun starts them."""
    port = str(free_port())
    processes = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        environment = own | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(Launched(*arguments, environment=environment))
    return processes


def start(ranks, *arguments, command="train"):
    """Run the program on that many ranks; return status and standard error."""
    processes = launch(ranks, command, *arguments)
    errors = [process.communicate(timeout=900)[1] for process in processes]
    return [process.returncode for process in processes], errors


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return [line["loss"] for line in lines(folder) if "lr" in line]


@pytest.fixture(scope="module")
def alone(glyph_cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    statuses, errors = start(1, *OPTIONS, "--cache", glyph_cache, "--out", folder)
    assert statuses == [0], errors
    return folder


def same_tensors(one, other):
    """Whether weights, optimizer state and averages of two checkpoints agree, whatever shape a single number has."""
    left, right = one.full_tensors(""), other.full_tensors("")
    assert left.keys() == right.keys() and any("exp_avg" in key for key in left)
    return all(torch.equal(value.reshape(-1), right[key].reshape(-1)) for key, value in left.items())


@pytest.mark.parametrize("ranks, parallel", [(4, "ddp"), pytest.param(2, "fsdp", marks=needs_shards)])
def test_ranks_have_the_loss_curve_of_one_process(ranks, parallel, alone, glyph_cache, tmp_path):
    statuses, errors = start(ranks, *OPTIONS, "--cache", glyph_cache, "--out", tmp_path, "--parallel", parallel)
    assert statuses == [0] * ranks, errors
    expected, found = losses(alone), losses(tmp_path)
    assert len(expected) == len(found) == STEPS
    assert found == pytest.approx(expected, abs=1e-5)
    for name in ("model", "model-ema"):
        weights, others = (load_file(f / name / "open_clip_model.safetensors") for f in (alone, tmp_path))
        assert weights.keys() == others.keys()
        for key, value in weights.items():
            assert value.shape == others[key].shape
            assert (value - others[key]).norm() <= 0.02 * value.norm(), key
    settings, records = json.loads((tmp_path / "run.json").read_text()), json.loads((alone / "run.json").read_text())
    assert settings["history"][-1]["naming_top1"] == pytest.approx(records["history"][-1]["naming_top1"], abs=0.02)


def test_ranks_steer_by_the_average_of_their_own_model(glyph_cache, tmp_path):
    words = (*OPTIONS, "--epochs", "1", "--self-reference", "0.9", "--temperature", "0.1", "--cache", glyph_cache)
    for count, parallel in ((1, "ddp"), (2, "ddp"), (2, "fsdp")):
        folder = tmp_path / f"{count} {parallel}"
        statuses, errors = start(count, *words, "--out", folder, "--parallel", parallel)
        assert statuses == [0] * count, errors
        own = Checkpoint(latest_checkpoint(folder / "checkpoints")).full_tensors("self_reference.")
        if count == 1:
            expected, averages = losses(folder), own
        assert len(averages) > 10 and averages.keys() == own.keys()
        assert losses(folder) == pytest.approx(expected, abs=1e-5)
        for key, value in averages.items():
            difference = value.double().reshape(-1) - own[key].double().reshape(-1)
            assert difference.norm() <= 0.02 * value.double().norm(), (key, parallel)


@pytest.mark.parametrize(
    "ranks, parallel, words",
    [
        (2, "ddp", ("--select", "rho-top-k", "--accumulation", "2")),
        pytest.param(
            2, "fsdp", ("--select", "jest", "--select-chunks", "4", "--method", "openclip"), marks=needs_shards
        ),
        (2, "ddp", ("--select", "jest", "--select-chunks", "4", "--method", "siglip")),
    ],
)
def test_ranks_train_on_the_pairs_that_one_process_chooses(ranks, parallel, words, glyph_cache, tmp_path):
    folders = [tmp_path / "one", tmp_path / "many"]
    for count, folder in zip((1, ranks), folders, strict=True):
        options = (*OPTIONS, "--epochs", "3", "--batch-size", "8", *words, "--candidates", "4", "--warmup", "5")
        options = (*options, "--cache", glyph_cache, "--out", folder)
        statuses, errors = start(count, *options, "--parallel", parallel)
        assert statuses == [0] * count, errors
    expected, found = ([line for line in lines(folder) if "lr" in line] for folder in folders)
    assert len(expected) == len(found) == 15
    for one, many in zip(expected, found, strict=True):
        assert many["loss"] == pytest.approx(one["loss"], abs=1e-5)
        for key in ("learnability_chosen", "learnability_candidates"):
            assert many[key] == pytest.approx(one[key], abs=1e-3)
        assert many["samples_scored"] == one["samples_scored"]
        assert many["samples_trained"] == one["samples_trained"]
    assert found[-1]["samples_scored"] == 450
    (record,) = json.loads((folders[1] / "run.json").read_text())["history"]
    assert [record["samples_scored"], record["samples_trained"]] == [450, found[-1]["samples_trained"]]


@pytest.mark.parametrize("ranks, parallel", [(3, "ddp"), pytest.param(2, "fsdp", marks=needs_shards)])
def test_the_sigmoid_loss_of_ranks_is_that_of_one_process(ranks, parallel, glyph_cache, tmp_path):
    """150 pairs in batches of up to 31: ranks have different numbers of pairs."""
    words = (*OPTIONS, "--method", "siglip", "--batch-size", "31", "--epochs", "3", "--cache", glyph_cache)
    for count, name in ((1, "one"), (ranks, "many")):
        statuses, errors = start(count, *words, "--parallel", parallel, "--out", tmp_path / name)
        assert statuses == [0] * count, errors
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "one"), rel=2e-5)
    one, many = (load_file(tmp_path / name / "model" / "open_clip_model.safetensors") for name in ("one", "many"))
    assert all((value - many[key]).norm() <= 0.02 * value.norm() for key, value in one.items())


@pytest.mark.parametrize("method", ["openclip", "drrho", "siglip"])
def test_a_model_with_a_logit_bias_trains_on_ranks_by_any_method(method, glyph_cache, tmp_path):
    config = new_model("glyph-micro", 0).config.model | {"init_logit_bias": -10, "init_logit_scale": 2.3}
    (tmp_path / "own.json").write_text(json.dumps(config))
    words = (*OPTIONS, "--model", tmp_path / "own.json", "--method", method, "--epochs", "2", "--cache", glyph_cache)
    statuses, errors = start(2, *words, "--out", tmp_path / "out")
    assert statuses == [0, 0], errors
    bias = load_file(tmp_path / "out" / "model" / "open_clip_model.safetensors")["logit_bias"]
    assert (bias.item() == -10) == (method != "siglip")


@pytest.mark.parametrize(
    "words",
    [
        ("--method", "drrho", "--distill", "0.5"),
        ("--method", "openclip"),
        ("--divergence", "chi-square"),
        ("--method", "two-level"),
        ("--method", "gist"),
    ],
)
def test_a_rank_of_which_no_pair_is_chosen_takes_part(words, tmp_path):
    """Of every four candidates, two on each rank, two are trained on: of twelve steps some have both on one rank."""
    members = []
    for k in range(48):
        members += [(f"{k}.png", image_bytes(31 * k, (48, 48))), (f"{k}.txt", f"letter {chr(97 + k)}".encode())]
    write_tar(tmp_path / "shards" / "0.tar", members)
    assert main(["catalog", str(tmp_path / "shards" / "0.tar"), "--out", str(tmp_path / "catalog")]) == 0
    options = ("--catalog", tmp_path / "catalog", "--epochs", "1", "--batch-size", "2", "--log-every", "1", *words)
    options = (*options, "--validations", "1", "--lr", "1e-4", "--select", "rho-top-k", "--candidates", "2")
    options = (*options, "--model", "glyph-small", "--reference", SHIPPED_REFERENCE, "--warmup", "50", "--workers", "0")
    options = options if {"openclip", "gist"} & set(words) else (*options, "--temperature", "0.1")
    for ranks in (1, 2):
        statuses, errors = start(ranks, *options, "--out", tmp_path / f"out{ranks}", "--accumulation", ranks)
        assert statuses == [0] * ranks, errors
    assert losses(tmp_path / "out2") == pytest.approx(losses(tmp_path / "out1"), abs=1e-5)
    assert len(losses(tmp_path / "out2")) == 12


@pytest.mark.parametrize("method", ["openclip", "two-level"])
def test_a_batch_of_one_pair_is_passed_over_on_ranks(method, tmp_path):
    """Of 7 pairs in batches of 2, a rank has one, or none; the last one is alone."""
    members = []
    for k in range(7):
        members += [(f"{k}.png", image_bytes(31 * k, (48, 48))), (f"{k}.txt", f"letter {chr(97 + k)}".encode())]
    write_tar(tmp_path / "0.tar", members)
    assert main(["catalog", str(tmp_path / "0.tar"), "--out", str(tmp_path / "catalog")]) == 0
    options = ("--catalog", tmp_path / "catalog", "--epochs", "1", "--batch-size", "2", "--log-every", "1")
    options = (*options, "--model", "glyph-micro", "--method", method, "--validations", "1", "--workers", "0")
    options = options if method == "openclip" else (*options, "--reference", SHIPPED_REFERENCE)
    for ranks in (1, 2):
        statuses, errors = start(ranks, *options, "--out", tmp_path / f"out{ranks}")
        assert statuses == [0] * ranks, errors
    one, two = ([line for line in lines(tmp_path / name)] for name in ("out1", "out2"))
    assert [line["samples_trained"] for line in one] == [line["samples_trained"] for line in two] == [2, 4, 6, 6]
    assert [line["loss"] for line in two[:3]] == pytest.approx([line["loss"] for line in one[:3]], abs=1e-5)
    assert one[3]["skipped/alone in its batch"] == two[3]["skipped/alone in its batch"] == 1


@needs_shards
def test_ranks_go_on_from_other_numbers_of_ranks(alone, glyph_cache, tmp_path):
    """The last checkpoint of one process, taken up by two with shards and by one again: all is the same, bit by bit."""
    (tmp_path / "out").mkdir()
    subprocess.run(["cp", "-r", alone / "checkpoints", tmp_path / "out"], check=True)
    statuses, errors = start(2, *OPTIONS, "--cache", glyph_cache, "--out", tmp_path / "out", "--parallel", "fsdp")
    assert statuses == [0, 0], errors
    weights, others = (load_file(f / "model" / "open_clip_model.safetensors") for f in (alone, tmp_path / "out"))
    assert all(torch.equal(weights[key], others[key]) for key in weights)
    one = Checkpoint(latest_checkpoint(alone / "checkpoints"))
    of_two = latest_checkpoint(tmp_path / "out" / "checkpoints")
    sizes = [path.stat().st_size for path in sorted(of_two.glob("part-*-of-2.safetensors"))]
    assert len(sizes) == 2 and min(sizes) > 0.4 * sum(sizes)  # each rank writes its shards
    two = Checkpoint(of_two)
    assert torch.equal(torch.cat([part["running.log_u"] for part in two.own], 1), one.own[0]["running.log_u"])
    assert same_tensors(one, two)
    statuses, errors = start(1, *OPTIONS, "--cache", glyph_cache, "--out", tmp_path / "out")
    assert statuses == [0], errors
    again = Checkpoint(latest_checkpoint(tmp_path / "out" / "checkpoints"))
    assert len(again.own) == 1 and same_tensors(one, again)
    assert torch.equal(again.own[0]["running.log_u"], one.own[0]["running.log_u"])


def test_ranks_cache_and_train_where_one_has_a_part_without_a_usable_sample(tmp_path):
    """Two ranks share the caching and have the losses of one process, though one's part of a batch is all skipped."""
    for shard in range(2):
        members = []
        for k in range(8):
            image = image_bytes(31 * k + 7 * shard, (48, 48)) if shard == 0 or k > 1 else b"damaged"
            members += [(f"{k}.png", image), (f"{k}.txt", f"letter {chr(97 + k + 8 * shard)}".encode())]
        write_tar(tmp_path / "shards" / f"{shard}.tar", members)
    assert main(["catalog", str(tmp_path / "shards" / "{0..1}.tar"), "--out", str(tmp_path / "catalog")]) == 0
    common = ("--catalog", tmp_path / "catalog", "--reference", SHIPPED_REFERENCE, "--workers", "0")
    statuses, errors = start(2, *common, "--out", tmp_path / "features", command="cache-reference")
    assert statuses == [0, 0], errors
    assert len(list((tmp_path / "features").iterdir())) == 2
    # Batches of 4, in which ranks have 2 pairs: with this seed both damaged ones are one rank's part.
    seed = 31
    order = Order([8, 8], seed=seed).visits(0, 0, 16).index.reshape(8, 2).tolist()
    assert [8, 9] in [sorted(part) for part in order]
    for reference in ("cached", "live"):
        given = ("--reference-features", tmp_path / "features") if reference == "cached" else ()
        options = (*common, *given, "--epochs", "1", "--batch-size", "4", "--log-every", "1", "--seed", seed)
        options = (*options, "--validations", "1", "--temperature", "0.1", "--lr", "1e-4", "--model", "glyph-small")
        options = (*options, "--warmup", "50")
        for ranks in (1, 2):
            statuses, errors = start(ranks, *options, "--out", tmp_path / f"{reference}{ranks}")
            assert statuses == [0] * ranks, errors
        expected, found = losses(tmp_path / f"{reference}1"), losses(tmp_path / f"{reference}2")
        assert found == pytest.approx(expected, abs=1e-5)
        assert len(expected) == 4


@pytest.mark.parametrize("number, lost", [(signal.SIGKILL, 1), (signal.SIGSTOP, 1), (signal.SIGSTOP, 0)])
def test_a_rank_that_dies_or_hangs_ends_the_others_with_its_name(number, lost, alone, glyph_cache, tmp_path):
    options = (*OPTIONS, "--cache", glyph_cache, "--out", tmp_path, "--epochs", "5000", "--exchange-minutes", "0.2")
    processes = launch(3, "train", *options)
    deadline = time.monotonic() + 300
    while not (tmp_path / "log.jsonl").is_file():
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.1)
    processes[lost].send_signal(number)
    start = time.monotonic()
    for rank in {0, 1, 2} - {lost}:
        _, errors = processes[rank].communicate(timeout=60)
        lines = [line for line in errors.splitlines() if line.startswith("run.py: error: ")]
        assert processes[rank].returncode == 2 and len(lines) == 1, errors
        assert f"rank {rank} lost rank {lost} in an exchange" in lines[0]
        assert "Traceback" not in errors
    assert time.monotonic() - start < 45
    processes[lost].kill()
    processes[lost].communicate()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The words that name a task of each kind and held-out pairs."""
    folder = tmp_path_factory.mktemp("tasks")
    names = [write(folder / name) for name, write in TASKS.items()]
    names += [write(folder) for write in (DATACOMP["wds_winogavil_test"], class_folders)]
    write_catalog(folder)
    return ("--tasks", *names, "--val-data", folder / "catalog")


def scores(path):
    stored = json.loads(path.read_text())
    return stored["settings"], stored["results"]


def test_ranks_evaluate_as_one_process(tasks, tmp_path):
    """As torchrun starts them; equal to the last digit, and what one rank began another number of them ends."""
    words = (SHIPPED_REFERENCE, *tasks, "--batch-size", "4")
    assert main(["evaluate", *map(str, words), "--out", str(tmp_path / "one.json")]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(PROGRAM)]
    words = [*map(str, words), "--out", str(tmp_path / "two.json")]
    done = subprocess.run([*command, "evaluate", *words], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("evaluate   held_out: loss") == done.stdout.count("main metric") == 1
    assert scores(tmp_path / "one.json") == scores(tmp_path / "two.json")
    settings, results = scores(tmp_path / "two.json")
    (tmp_path / "two.json").write_text(json.dumps({"settings": settings, "results": results[2:]}))
    statuses, errors = start(3, *words, command="evaluate")
    assert statuses == [0] * 3, errors
    by_name = {row["name"]: row for row in results}
    assert {row["name"]: row for row in scores(tmp_path / "two.json")[1]} == by_name


def test_ranks_that_meet_a_damaged_task_end_before_and_during_the_work(tasks, tmp_path):
    folder = TASKS["classification"](tmp_path / "damaged")
    (folder / "test" / "1.tar").write_bytes(b"damaged")
    words = (SHIPPED_REFERENCE, *tasks[:2], folder, "--batch-size", "4")
    statuses, errors = start(2, *words, command="evaluate")
    assert statuses == [2, 2] and all("1.tar is damaged" in error for error in errors)
    write_task(tmp_path / "wrong", [samples([b"0"] * 5 + [b"9"], "cls")])
    statuses, errors = start(2, *words[:-3], tmp_path / "wrong", *words[-2:], command="evaluate")
    assert statuses == [2, 2]
    assert "class '9'" in errors[1] and "stopped because rank 1 did" in errors[0]


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=needs_shards)])
def test_ranks_validate_in_training_as_evaluate_does_afterwards(parallel, tasks, tmp_path):
    assert main(["catalog", "synthetic:48:48", "--out", str(tmp_path / "catalog"), "--workers", "0"]) == 0
    options = ("--catalog", tmp_path / "catalog", "--epochs", "2", "--batch-size", "16", "--method", "openclip")
    options = (*options, *tasks, "--validation-batch-size", "4", "--best", "held_out/loss", "--validations", "2")
    options = (*options, "--parallel", parallel, "--model", "glyph-micro", "--workers", "0", "--lr", "2e-3")
    statuses, errors = start(2, *options, "--out", tmp_path / "out")
    assert statuses == [0, 0], errors
    history = json.loads((tmp_path / "out" / "run.json").read_text())["history"]
    lowest = min(history, key=lambda record: record["held_out/loss"])
    for name, record in (("model", history[-1]), ("model-best", lowest)):
        model = tmp_path / "out" / name
        words = ("evaluate", model, *tasks, "--batch-size", "4", "--out", tmp_path / f"{name}.json")
        assert main(list(map(str, words))) == 0
        found = {
            f"{row['name']}/{metric}": value
            for row in scores(tmp_path / f"{name}.json")[1]
            for metric, value in row["metrics"].items()
        }
        assert found == pytest.approx({key: record[key] for key in found}, abs=1e-5)


def test_ranks_wait_for_the_leader_s_preparation_as_long_as_it_lives(tmp_path):
    """Drawing the data takes longer than an exchange may; then the leader hangs while it draws, or fails."""
    options = (*OPTIONS, "--epochs", "1", "--exchange-minutes", "0.05", "--method", "fastclip", "--temperature", "0.1")
    processes = launch(2, "train", *options, "--size", "full", "--cache", tmp_path / "a", "--out", tmp_path / "out")
    drawing = time.monotonic()
    while not any((tmp_path / "a").glob(".*.partial-*")):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)
    assert time.monotonic() - drawing > 60 * 0.05
    processes[0].send_signal(signal.SIGSTOP)
    error = processes[1].communicate(timeout=60)[1]
    processes[0].kill()
    processes[0].communicate()
    assert processes[1].returncode == 2 and "rank 1 lost rank 0, which has had no pulse for 3 seconds" in error
    (tmp_path / "file").write_bytes(b"")
    statuses, errors = start(2, *options, "--cache", tmp_path / "file", "--out", tmp_path / "out")
    assert statuses == [2, 2]
    assert "run.py: error: cannot" in errors[0] and re.search(
        "stopped because rank 0 did|rank 1 lost rank 0", errors[1]
    )


def test_a_run_on_other_pairs_is_refused(alone, glyph_cache, tmp_path):
    subprocess.run(["cp", "-r", alone / "checkpoints", tmp_path], check=True)
    statuses, errors = start(1, *OPTIONS, "--select", "rho-top-k", "--cache", glyph_cache, "--out", tmp_path)
    assert statuses == [2]
    assert "was made with select=all, now it is rho-top-k" in errors[0]


def test_wrong_options_are_said_once_and_all_stop(glyph_cache, tmp_path):
    statuses, errors = start(2, "--batch-size", "1", "--cache", glyph_cache, "--out", tmp_path)
    assert statuses == [2, 2]
    assert [bool(error) for error in errors] == [True, False]
    assert "--batch-size must be at least 2" in errors[0]
