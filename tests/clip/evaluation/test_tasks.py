"""A model's scores on zero-shot tasks: CLIP_benchmark's own numbers, its definitions, memory, several ranks."""

import gc
import io
import json
import shutil
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from processes import start_ranks
from sklearn.metrics import balanced_accuracy_score
from task_folders import (
    CAPTIONS,
    CLASSES,
    DATACOMP,
    LABELS,
    TARGETS,
    TASKS,
    TEMPLATES,
    UNUSABLE,
    Largest,
    class_folders,
    classification,
    evaluate,
    multilabel,
    picture,
    retrieval,
    samples,
    write_catalog,
    write_task,
)

from experiments.clip.catalog.catalog import open_catalog
from experiments.clip.distributed import ONE_PROCESS, Ranks
from experiments.clip.errors import UserError
from experiments.clip.evaluation import encoding, metrics
from experiments.clip.evaluation.encoding import Encoder
from experiments.clip.evaluation.held_out import evaluate_pairs
from experiments.clip.models.clip import load_model
from experiments.clip.training.options import SHIPPED_REFERENCE

RECORDED = Path(__file__).parents[2] / "fixtures" / "clip_benchmark.json"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small models gain nothing from more, and the ranks have one each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=TASKS)
def task(request, tmp_path):
    return TASKS[request.param](tmp_path / request.param)


@torch.no_grad()
def image_features(clip, count):
    pictures = [Image.open(io.BytesIO(picture(i, ("png", "jpg", "webp")[i % 3]))) for i in range(count)]
    return F.normalize(clip.model.encode_image(torch.stack([clip.preprocess(image) for image in pictures])), dim=-1)


@torch.no_grad()
def class_vectors(clip):
    vectors = []
    for name in CLASSES:
        features = clip.model.encode_text(clip.tokenize([line.format(c=name) for line in TEMPLATES]))
        mean = F.normalize(features, dim=-1).mean(dim=0)
        vectors.append(mean / mean.norm())
    return torch.stack(vectors)


# --- CLIP_benchmark's numbers ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["glyph-names", "glyph-base-letter", "glyph-retrieval", *TASKS])
def test_scores_are_those_of_clip_benchmarks_command(name, glyph_tasks, reference, tmp_path):
    recorded = json.loads(RECORDED.read_text())["results"][name]
    scores = evaluate(reference, TASKS[name](tmp_path / name) if name in TASKS else glyph_tasks[name])
    assert (scores.name, scores.task) == (name, recorded["task"])
    expected = {key: value for key, value in recorded["metrics"].items() if value is not None}
    assert expected.keys() <= scores.metrics.keys()
    assert {key: scores.metrics[key] for key in expected} == pytest.approx(expected, abs=1e-4)


# --- the definitions ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("workers", [0, 2])
def test_classification_is_the_definition(batch_size, workers, reference, tmp_path):
    steps = []
    scores = evaluate(
        reference,
        classification(tmp_path / "noise"),
        batch_size=batch_size,
        workers=workers,
        progress=lambda done, total: steps.append((done, total)),
    )
    logits = 100 * image_features(reference, len(LABELS)) @ class_vectors(reference).T
    labels = torch.tensor(LABELS)
    right = logits.topk(5, dim=1).indices == labels[:, None]
    assert scores[:3] == ("noise", "zeroshot_classification", len(LABELS))
    assert scores.metrics == pytest.approx(
        {
            "acc1": right[:, :1].any(dim=1).double().mean().item(),
            "acc5": right.any(dim=1).double().mean().item(),
            "mean_per_class_recall": balanced_accuracy_score(LABELS, logits.argmax(dim=1)),
        }
    )
    assert steps[-1] == (11, 11)
    assert steps == sorted(set(steps))


def test_fewer_than_five_classes_have_no_acc5(reference, tmp_path):
    write_task(tmp_path / "few", [samples([b"0", b"3"], "cls")], classes=CLASSES[:4])
    assert evaluate(reference, tmp_path / "few").metrics.keys() == {"acc1", "mean_per_class_recall"}


def test_retrieval_is_the_definition(reference, tmp_path):
    scores = evaluate(reference, retrieval(tmp_path / "captions"), batch_size=3)
    images = image_features(reference, len(CAPTIONS))
    with torch.no_grad():
        texts = reference.encode_text([caption for some in CAPTIONS for caption in some])
    owner = torch.tensor([number for number, some in enumerate(CAPTIONS) for _ in some])
    expected = {}
    for k in (1, 5):
        found = (texts @ images.T).topk(k, dim=1).indices == owner[:, None]
        expected[f"image_retrieval_recall@{k}"] = found.any(dim=1).double().mean().item()
        found = owner[(images @ texts.T).topk(k, dim=1).indices] == torch.arange(len(images))[:, None]
        expected[f"text_retrieval_recall@{k}"] = found.any(dim=1).double().mean().item()
    # The seven images have no tenth.
    assert scores.metrics.keys() - expected.keys() == {"text_retrieval_recall@10"}
    assert {key: scores.metrics[key] for key in expected} == pytest.approx(expected)
    assert (scores.task, scores.samples) == ("zeroshot_retrieval", 7)


def test_multilabel_is_the_mean_of_average_precisions(reference, tmp_path):
    scores = evaluate(reference, multilabel(tmp_path / "many"), batch_size=3)
    logits = image_features(reference, len(LABELS)) @ class_vectors(reference).T
    precisions = []
    for column, targets in zip(logits.T, TARGETS.T, strict=True):
        truth = targets[column.argsort(descending=True).numpy()]
        precision = truth.cumsum() / np.arange(1, len(truth) + 1)
        precisions.append(precision[truth].sum() / max(truth.sum(), 1))
    assert scores.metrics == pytest.approx({"mean_average_precision": np.mean(precisions)})


def test_classes_of_one_name_tie_and_the_first_wins(reference, tmp_path):
    classes = [*CLASSES, CLASSES[0]]
    logits = image_features(reference, 11) @ class_vectors(reference).T
    chosen = logits.argmax(dim=1).tolist()
    for folder, labels in (("first", chosen), ("second", [6 if label == 0 else label for label in chosen])):
        write_task(tmp_path / folder, [samples([str(n).encode() for n in labels], "cls")], classes=classes)
    assert evaluate(reference, tmp_path / "first", batch_size=2).metrics["acc1"] == 1
    second = evaluate(reference, tmp_path / "second", batch_size=2).metrics["acc1"]
    assert second == pytest.approx(1 - chosen.count(0) / 11)


@pytest.mark.slow
def test_model_is_scored_in_evaluation_mode_and_left_as_it_was(task):
    clip = load_model(SHIPPED_REFERENCE)
    modes = []
    clip.model.visual.register_forward_hook(lambda module, *_: modes.append(module.training))
    for training in (True, False):
        clip.model.train(training)
        evaluate(clip, task)
        assert clip.model.training is training
    assert not any(modes)


def held():
    """Return how many bytes of tensors there are."""
    gc.collect()
    sizes = {}
    for tensor in [item for item in gc.get_objects() if type(item) is torch.Tensor]:
        try:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        except (RuntimeError, NotImplementedError):
            continue  # a wrapper without memory, of a transform or of torch.compile: a test before may have left it
    sizes.pop(0, None)  # of the meta device
    return sum(sizes.values())


@pytest.mark.slow
def test_only_tensors_that_have_memory_are_counted():
    inside = torch.ones(3)
    before = held()
    compiling = torch._to_functional_tensor(inside), torch.ones(5, device="meta")
    with pytest.raises(RuntimeError, match="invalid python storage"):
        compiling[0].untyped_storage().data_ptr()
    kept = torch.ones(7)
    assert held() - before == kept.nbytes


WIDTH = 8


@pytest.fixture(scope="module")
def tiny(reference):
    vision = {"layers": 1, "width": 16, "head_width": 8, "image_size": 16, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(embed_dim=WIDTH, vision_cfg=vision, text_cfg=text)
    tokenizer = open_clip.SimpleTokenizer(context_length=8)

    def preprocess(image):
        return torch.tensor(np.array(image.resize((16, 16)))).permute(2, 0, 1) / 255

    return replace(reference, name="tiny", model=model, preprocess=preprocess, tokenize=tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("kind, suffix", [("classification", "cls"), ("retrieval", "txt")])
def test_memory_grows_by_the_features_that_recall_needs_and_no_more(kind, suffix, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "_QUERIES", 32)
    monkeypatch.setattr(metrics, "TILE", 64)
    monkeypatch.setattr(encoding, "_BLOCK", 32)
    image, few, many, batch = picture(0), 128, 1024, 64
    made, kept = [], []
    for count in (few, many):
        members = []
        for number in range(count):
            members += [(f"{number}.png", image), (f"{number}.{suffix}", b"%d" % (number % len(CLASSES)))]
        folder = write_task(tmp_path / str(count), [members], kind if kind == "retrieval" else None)
        before, last = held(), []

        def look(done, total, last=last, before=before):
            if done == total:
                last.append(held() - before)

        with Largest() as largest:
            evaluate(tiny, folder, batch_size=batch, progress=look)
        made.append(largest.size)
        kept += last
    if kind == "classification":
        assert made[0] == made[1]
        # Of each sample: its class, the wrong classes ahead of it, the class that scores highest.
        assert kept[1] - kept[0] == (many - few) * 3 * 8
    else:
        assert made[1] == max(made[0], many * WIDTH)  # and no square
        # Of each sample: two features, the number of its captions, whether this rank has them.
        assert kept[1] - kept[0] == (many - few) * (2 * WIDTH * 4 + 8 + 1)


# --- several ranks --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rank_answers(tmp_path_factory):
    """What 2 ranks with batches of 2, and 3 with batches of 6, say of each task and of held-out pairs.

    All in one start of three processes.

    Of 6, the captions are fewer batches than ranks.
    """
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs gloo")
    folder = tmp_path_factory.mktemp("ranks")
    for name, write in TASKS.items():
        write(folder / name)
    for write in (*DATACOMP.values(), class_folders):
        write(folder)
    write_catalog(folder, damaged=UNUSABLE)
    damaged = classification(folder / "damaged")
    write_task(folder / "other", [samples([b"1", b"6", b"1"], "cls")])
    shutil.copy(folder / "other" / "test" / "0.tar", damaged / "test" / "1.tar")
    start_ranks(work, (str(folder),), 3)
    return folder


def work(rank, folder):
    """One process: score every task, then meet a damaged one, as one of two and one of three."""
    torch.set_num_threads(1)
    patience = timedelta(seconds=120)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", patience, rank=rank, world_size=3)
    try:
        clip = load_model(SHIPPED_REFERENCE)
        pair = dist.new_group([0, 1])
        for world, batch_size, group in ((2, 2, pair), (3, 6, dist.group.WORLD)):
            if rank < world:
                ranks = Ranks(rank, world, clip.device, group)
                torch.save(answers(clip, Path(folder), batch_size, ranks), Path(folder) / f"{world}-{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


ALL = (*TASKS, *DATACOMP, "val")


def pairs(clip, folder, ranks, batch_size):
    return evaluate_pairs(Encoder(clip, ranks, batch_size), open_catalog(folder / "catalog"))


def answers(clip, folder, batch_size, ranks):
    found = {"pairs": pairs(clip, folder, ranks, batch_size)}
    for name in ALL:
        steps = []
        scores = evaluate(
            clip,
            folder / name,
            ranks,
            batch_size=batch_size,
            progress=lambda done, total, steps=steps: steps.append((done, total)),
        )
        found[name] = (*scores, steps[-1])
    try:
        evaluate(clip, folder / "damaged", ranks, batch_size=batch_size)
    except UserError as error:
        found["damaged"] = str(error)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world, batch_size", [(2, 2), (3, 6)])
def test_every_rank_has_the_scores_of_one_process(world, batch_size, reference, rank_answers):
    alone = {name: evaluate(reference, rank_answers / name, batch_size=batch_size) for name in ALL}
    found = [torch.load(rank_answers / f"{world}-{rank}.pt", weights_only=False) for rank in range(world)]
    of_pairs = pairs(reference, rank_answers, ONE_PROCESS, batch_size)
    for of_rank in found:
        assert of_rank["pairs"] == of_pairs
        for name in ALL:
            assert of_rank[name] == (*alone[name], (alone[name].samples,) * 2)
    messages = [of_rank["damaged"] for of_rank in found]
    (stopped,) = [rank for rank, message in enumerate(messages) if "s0000001.cls" in message]
    others = [message for rank, message in enumerate(messages) if rank != stopped]
    assert others == [f"stopped because rank {stopped} did: see its message"] * (world - 1)


@pytest.mark.slow
@pytest.mark.parametrize("parameter, kind", [("visual.proj", "image"), ("text_projection", "text")])
def test_model_that_diverged_is_refused(parameter, kind, task):
    clip = load_model(SHIPPED_REFERENCE)
    with torch.no_grad():
        clip.model.get_parameter(parameter).fill_(torch.nan)
    with pytest.raises(UserError, match=f"{kind} features that are not finite"):
        evaluate(clip, task)
