"""Tasks in CLIP_benchmark's layout: its own numbers, its definitions, several ranks, damage."""

import gc
import io
import json
import shutil
import tarfile
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import balanced_accuracy_score
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.clip.distributed import Ranks
from experiments.clip.errors import UserError
from experiments.clip.evaluation import metrics as evaluate_module
from experiments.clip.evaluation import tasks as benchmark_tasks
from experiments.clip.evaluation.tasks import evaluate_task, wrong_items_ahead
from experiments.clip.glyphs.dataset import read_samples
from experiments.clip.glyphs.evaluation import evaluate
from experiments.clip.glyphs.stream import PreparedPairs
from experiments.clip.glyphs.tasks import write_glyph_tasks
from experiments.clip.models.clip import load_model
from experiments.clip.training.options import SHIPPED_REFERENCE

RECORDED = Path(__file__).parents[2] / "fixtures" / "clip_benchmark.json"
CLASSES = ["latin small letter a", "greek capital letter omega", "comma", "digit two", "snowman", "black square"]
TEMPLATES = ["{c}", "a drawing of {c}", "{c} in bold"]


def picture(seed, suffix="png"):
    noise = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    data = io.BytesIO()
    kind, options = {"png": ("PNG", {}), "jpg": ("JPEG", {}), "webp": ("WEBP", {"lossless": True})}[suffix]
    Image.fromarray(noise).save(data, kind, **options)
    return data.getvalue()


def npy(label):
    data = io.BytesIO()
    np.save(data, np.asarray(label), allow_pickle=True)
    return data.getvalue()


def write_task(folder, shards, kind=None, classes=CLASSES, templates=TEMPLATES):
    """``shards``: each a list of (member name, bytes)."""
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "nshards.txt").write_text(f"{len(shards)}\n")
    if kind is not None:
        (folder / "dataset_type.txt").write_text(f"{kind}\n")
    if kind != "retrieval":
        (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in classes))
        (folder / "zeroshot_classification_templates.txt").write_text("".join(f"{line}\n" for line in templates))
    for number, members in enumerate(shards):
        with tarfile.open(folder / "test" / f"{number}.tar", "w") as archive:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return folder


def samples(labels, suffix, first=0, images=("png", "jpg", "webp")):
    """Members of a shard: an image of noise and a label each."""
    members = []
    for number, label in enumerate(labels, first):
        image = images[number % len(images)]
        members += [(f"s{number:07d}.{image}", picture(number, image)), (f"s{number:07d}.{suffix}", label)]
    return members


LABELS = [0, 1, 2, 1, 1, 3, 5, 5, 0, 1, 2]  # none of class 4
CAPTIONS = [["comma"], ["digit two", "two"], ["snowman", "snow", "man"], ["omega"], ["a"], ["b", "c"], ["full stop"]]
TARGETS = np.random.default_rng(5).random((len(LABELS), len(CLASSES))) < 0.4
TARGETS[:, 4] = False


def classification(folder):
    data = [str(label).encode() for label in LABELS]
    return write_task(folder, [samples(data[:7], "cls"), samples(data[7:], "cls", 7)])


def retrieval(folder):
    data = ["\n".join(captions).encode() for captions in CAPTIONS]
    return write_task(folder, [samples(data[:2], "txt"), samples(data[2:], "txt", 2)], "retrieval")


def multilabel(folder):
    data = [npy(row.astype(np.int64)) for row in TARGETS]
    return write_task(folder, [samples(data[:4], "npy"), samples(data[4:], "npy", 4)], "multilabel")


TASKS = {"classification": classification, "retrieval": retrieval, "multilabel": multilabel}


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


@pytest.fixture(scope="module")
def glyph_tasks(manifest, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks") / "glyphs"
    return {path.name: path for path in write_glyph_tasks(manifest, folder, shard_size=64)}


@pytest.mark.parametrize("name", ["glyph-names", "glyph-base-letter", "glyph-retrieval", *TASKS])
def test_scores_are_those_of_clip_benchmarks_command(name, glyph_tasks, reference, tmp_path):
    recorded = json.loads(RECORDED.read_text())["results"][name]
    scores = evaluate_task(reference, TASKS[name](tmp_path / name) if name in TASKS else glyph_tasks[name])
    assert (scores.name, scores.task) == (name, recorded["task"])
    expected = {key: value for key, value in recorded["metrics"].items() if value is not None}
    assert expected.keys() <= scores.metrics.keys()
    assert {key: scores.metrics[key] for key in expected} == pytest.approx(expected, abs=1e-4)


def test_glyph_tasks_agree_with_the_evaluation_of_pairs_in_memory(glyph_tasks, manifest, reference):
    pairs = PreparedPairs(manifest, "test", reference)
    result = evaluate(
        reference.encode_image, reference.encode_text, pairs.image_batches(), pairs.captions, manifest.vocabulary
    )
    named = evaluate_task(reference, glyph_tasks["glyph-names"])
    assert named.samples == len(pairs)
    assert named.metrics["acc1"] == pytest.approx(result.naming.top1, abs=1e-9)
    assert named.metrics["acc5"] == pytest.approx(result.naming.top5, abs=1e-9)
    letters = evaluate_task(reference, glyph_tasks["glyph-base-letter"])
    assert letters.metrics["acc1"] == pytest.approx(result.attributes["base letter"].top1, abs=1e-9)
    assert letters.metrics["mean_per_class_recall"] == pytest.approx(result.attributes["base letter"].balanced)


# --- the definitions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("workers", [0, 2])
def test_classification_is_the_definition(batch_size, workers, reference, tmp_path):
    steps = []
    scores = evaluate_task(
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
    assert evaluate_task(reference, tmp_path / "few").metrics.keys() == {"acc1", "mean_per_class_recall"}


def test_retrieval_is_the_definition(reference, tmp_path):
    scores = evaluate_task(reference, retrieval(tmp_path / "captions"), batch_size=3)
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
    scores = evaluate_task(reference, multilabel(tmp_path / "many"), batch_size=3)
    logits = image_features(reference, len(LABELS)) @ class_vectors(reference).T
    precisions = []
    for column, targets in zip(logits.T, TARGETS.T, strict=True):
        truth = targets[column.argsort(descending=True).numpy()]
        precision = truth.cumsum() / np.arange(1, len(truth) + 1)
        precisions.append(precision[truth].sum() / max(truth.sum(), 1))
    assert scores.metrics == pytest.approx({"mean_average_precision": np.mean(precisions)})


@pytest.mark.parametrize("tile", [1, 4, 7, 100])
def test_wrong_items_ahead_is_a_stable_sort(tile):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randint(-1, 2, (30, 3), generator=generator).float()  # many ties
    items = torch.randint(-1, 2, (25, 3), generator=generator).float()
    query_labels = torch.randint(0, 8, (30,), generator=generator)
    item_labels = torch.cat([torch.arange(8), torch.randint(0, 8, (17,), generator=generator)])
    ahead = wrong_items_ahead(queries, items, query_labels, item_labels, tile)
    order = (queries @ items.T).sort(dim=1, descending=True, stable=True).indices
    expected = (item_labels[order] == query_labels[:, None]).int().argmax(dim=1)
    assert torch.equal(ahead, expected)


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns, in numbers."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else [result]
        self.size = max([self.size, *(part.numel() for part in made if isinstance(part, torch.Tensor))])
        return result


def test_wrong_items_ahead_never_holds_all_scores():
    queries, items = torch.randn(8, 4), torch.randn(100_000, 4)
    labels = torch.arange(100_000)
    with Largest() as largest:
        wrong_items_ahead(queries, items, labels[:8], labels, 1000)
    assert largest.size == 8 * 1000


def test_classes_of_one_name_tie_and_the_first_wins(reference, tmp_path):
    classes = [*CLASSES, CLASSES[0]]
    logits = image_features(reference, 11) @ class_vectors(reference).T
    chosen = logits.argmax(dim=1).tolist()
    for folder, labels in (("first", chosen), ("second", [6 if label == 0 else label for label in chosen])):
        write_task(tmp_path / folder, [samples([str(n).encode() for n in labels], "cls")], classes=classes)
    assert evaluate_task(reference, tmp_path / "first", batch_size=2).metrics["acc1"] == 1
    second = evaluate_task(reference, tmp_path / "second", batch_size=2).metrics["acc1"]
    assert second == pytest.approx(1 - chosen.count(0) / 11)


def test_model_is_scored_in_evaluation_mode_and_left_as_it_was(task):
    clip = load_model(SHIPPED_REFERENCE)
    modes = []
    clip.model.visual.register_forward_hook(lambda module, *_: modes.append(module.training))
    for training in (True, False):
        clip.model.train(training)
        evaluate_task(clip, task)
        assert clip.model.training is training
    assert not any(modes)


def test_members_of_other_kinds_are_passed_over_unread(reference, task, tmp_path):
    expected = evaluate_task(reference, task)
    for path in (task / "test").glob("*.tar"):
        extended = tmp_path / "extended.tar"
        with tarfile.open(path) as old, tarfile.open(extended, "w") as new:
            for member in old.getmembers():
                data = old.extractfile(member).read()
                member.name = f"./{member.name.replace('.png', '.PNG')}"
                new.addfile(member, io.BytesIO(data))
                for suffix in ("json", "pickle", "pyd", "2.png", "PNG.txt"):
                    if member.name.lower().endswith(("png", "jpg", "webp")):
                        new.addfile(other := tarfile.TarInfo(f"{member.name.rsplit('.', 1)[0]}.{suffix}"))
                        assert other.size == 0
        extended.replace(path)
    assert evaluate_task(reference, task) == expected


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


@pytest.mark.parametrize("kind, suffix", [("classification", "cls"), ("retrieval", "txt")])
def test_memory_grows_by_the_features_that_recall_needs_and_no_more(kind, suffix, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_tasks, "_QUERIES", 32)
    monkeypatch.setattr(benchmark_tasks, "_ITEMS", 64)
    monkeypatch.setattr(evaluate_module, "_BLOCK", 32)
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
            evaluate_task(tiny, folder, batch_size=batch, progress=look)
        made.append(largest.size)
        kept += last
    if kind == "classification":
        assert made[0] == made[1]
        assert kept[0] == kept[1]
    else:
        assert made[1] == max(made[0], many * WIDTH)  # and no square
        # Of each sample: two features, the number of its captions, whether this rank has them.
        assert kept[1] - kept[0] == (many - few) * (2 * WIDTH * 4 + 8 + 1)


# --- several ranks --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rank_answers(tmp_path_factory):
    """What 2 ranks with batches of 2, and 3 with batches of 6, say of each task; all in one start of three processes.

    Of 6, the captions are fewer batches than ranks.
    """
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs gloo")
    folder = tmp_path_factory.mktemp("ranks")
    for name, write in TASKS.items():
        write(folder / name)
    damaged = classification(folder / "damaged")
    write_task(folder / "other", [samples([b"1", b"6", b"1"], "cls")])
    shutil.copy(folder / "other" / "test" / "0.tar", damaged / "test" / "1.tar")
    # The three are forks of one process that has imported what takes long.
    multiprocessing.set_forkserver_preload(["experiments.clip.evaluation.tasks", "sklearn.metrics", "pytest"])
    multiprocessing.start_processes(work, args=(str(folder),), nprocs=3, start_method="forkserver")
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


def answers(clip, folder, batch_size, ranks):
    found = {}
    for name in TASKS:
        steps = []
        scores = evaluate_task(
            clip,
            folder / name,
            ranks,
            batch_size=batch_size,
            progress=lambda done, total, steps=steps: steps.append((done, total)),
        )
        found[name] = (*scores, steps[-1])
    try:
        evaluate_task(clip, folder / "damaged", ranks, batch_size=batch_size)
    except UserError as error:
        found["damaged"] = str(error)
    return found


@pytest.mark.parametrize("world, batch_size", [(2, 2), (3, 6)])
def test_every_rank_has_the_scores_of_one_process(world, batch_size, reference, rank_answers):
    alone = {name: evaluate_task(reference, rank_answers / name, batch_size=batch_size) for name in TASKS}
    found = [torch.load(rank_answers / f"{world}-{rank}.pt") for rank in range(world)]
    for name in TASKS:
        for of_rank in found:
            assert of_rank[name] == (*alone[name], (alone[name].samples,) * 2)
    messages = [of_rank["damaged"] for of_rank in found]
    (stopped,) = [rank for rank, message in enumerate(messages) if "s0000001.cls" in message]
    others = [message for rank, message in enumerate(messages) if rank != stopped]
    assert others == [f"stopped because rank {stopped} did: see its message"] * (world - 1)


# --- damage ---------------------------------------------------------------------------------------------------


def shorten(path):
    path.write_bytes(path.read_bytes()[:-11_000])


def flip_header(path):
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        data[archive.getmembers()[2].offset + 3] ^= 0x40
    path.write_bytes(data)


def rewrite(members):
    def damage(path):
        with tarfile.open(path, "w") as archive:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))

    return damage


def bomb():
    data = io.BytesIO()
    Image.new("1", (9000, 9000)).save(data, "PNG")
    return data.getvalue()


def gif():
    data = io.BytesIO()
    Image.new("L", (8, 8)).save(data, "GIF")
    return data.getvalue()


SHARD_DAMAGE = {
    "cut off": (shorten, r"0\.tar is damaged"),
    "a header damaged": (flip_header, r"0\.tar is damaged"),
    "not a tar": (lambda path: path.write_bytes(b"gone" * 500), r"0\.tar is damaged"),
    "empty file": (lambda path: path.write_bytes(b""), r"0\.tar is damaged"),
    "gone": (lambda path: path.unlink(), r"0\.tar is missing, one of the 1 shards that nshards\.txt counts"),
    "no samples": (rewrite([]), "hold no sample"),
    "no label": (rewrite([("a.png", picture(0))]), r"sample a of .*0\.tar has no member \.cls"),
    "no image": (rewrite([("a.cls", b"1")]), r"sample a of .*0\.tar has no member \.webp"),
    "two labels": (rewrite([("a.cls", b"1"), ("a.CLS", b"1"), ("a.png", picture(0))]), r"two members \.cls"),
    "large label": (rewrite([("a.cls", bytes(2**20 + 1)), ("a.png", picture(0))]), "1048577 bytes"),
    "class too high": (rewrite(samples([b"1", b"6"], "cls")), r"s0000001\.cls in .*class '6'.* lines for 0 to 5"),
    "class negative": (rewrite(samples([b"-1"], "cls")), r"class '-1'"),
    "class in words": (rewrite(samples([b"snowman"], "cls")), "class 'snowman'"),
    "class of bytes": (rewrite(samples([b"\xff\x80"], "cls")), r"s0000000\.cls"),
    "image damaged": (rewrite([("a.png", picture(0)[:-400]), ("a.cls", b"1")]), r"a\.png in .*0\.tar is of no use"),
    "image is text": (rewrite([("a.jpg", b"hello"), ("a.cls", b"1")]), r"a\.jpg in"),
    "image of another type": (rewrite([("a.png", gif()), ("a.cls", b"1")]), r"a\.png in"),
    "image too large": (rewrite([("a.png", bomb()), ("a.cls", b"1")]), "9000 x 9000 pixels exceed"),
}


@pytest.mark.parametrize("damage, message", SHARD_DAMAGE.values(), ids=SHARD_DAMAGE)
def test_damaged_shards_are_refused_by_name(damage, message, reference, tmp_path):
    folder = write_task(tmp_path / "task", [samples([b"1"] * 6, "cls")])
    damage(folder / "test" / "0.tar")
    with pytest.raises(UserError, match=message) as refusal:
        evaluate_task(reference, folder)
    assert "\n" not in str(refusal.value)


FILE_DAMAGE = {
    "no folder": (".", None, "there is no task"),
    "no count": ("test/nshards.txt", None, r"nshards\.txt is missing"),
    "count in words": ("test/nshards.txt", b"two\n", "nshards.txt says 'two'"),
    "count of zero": ("test/nshards.txt", b"0", "nshards.txt says '0'"),
    "count too high": ("test/nshards.txt", b"3", r"2\.tar is missing"),
    "count too low": ("test/nshards.txt", b"1", r"1\.tar is not among the 1 shards"),
    "no classes": ("classnames.txt", None, r"classnames\.txt is missing"),
    "empty class": ("classnames.txt", b"a\n\nb\n", r"line 2 of .*classnames\.txt is empty"),
    "empty classes": ("classnames.txt", b"", r"classnames\.txt is empty"),
    "classes in latin-1": ("classnames.txt", b"caf\xe9\n", "as UTF-8"),
    "no templates": ("zeroshot_classification_templates.txt", None, r"templates\.txt is missing"),
    "template without class": ("zeroshot_classification_templates.txt", b"{c}\na photo\n", "line 'a photo'"),
    "template of attributes": ("zeroshot_classification_templates.txt", b"{c} {c.__class__}\n", "use no other brace"),
    "unknown type": ("dataset_type.txt", b"captioning", "says 'captioning'"),
}


@pytest.mark.parametrize("name, content, message", FILE_DAMAGE.values(), ids=FILE_DAMAGE)
def test_damaged_files_are_refused_by_name(name, content, message, reference, tmp_path):
    folder = classification(tmp_path / "task")
    if content is not None:
        (folder / name).write_bytes(content)
    elif name == ".":
        shutil.rmtree(folder)
    else:
        (folder / name).unlink()
    with pytest.raises(UserError, match=message):
        evaluate_task(reference, folder)


def test_image_without_a_caption_is_refused(reference, tmp_path):
    write_task(tmp_path / "task", [samples([b"comma", b""], "txt")], "retrieval")
    with pytest.raises(UserError, match=r"s0000001\.txt in .*no caption"):
        evaluate_task(reference, tmp_path / "task")


@pytest.mark.parametrize(
    "label, message",
    [
        (npy([1, 0]), r"shape \(2,\); classnames.txt has 6 lines"),
        (npy([2, 0, 0, 0, 0, 0]), "not 0 or 1"),
        (npy(np.array([None] * 6)), "allow_pickle=False"),
        (b"pickle", r"s0000000\.npy"),
    ],
)
def test_label_array_that_is_none_is_refused(label, message, reference, tmp_path):
    write_task(tmp_path / "task", [samples([label], "npy")], "multilabel")
    with pytest.raises(UserError, match=message):
        evaluate_task(reference, tmp_path / "task")


@pytest.mark.parametrize("parameter, kind", [("visual.proj", "image"), ("text_projection", "text")])
def test_model_that_diverged_is_refused(parameter, kind, task):
    clip = load_model(SHIPPED_REFERENCE)
    with torch.no_grad():
        clip.model.get_parameter(parameter).fill_(torch.nan)
    with pytest.raises(UserError, match=f"{kind} features that are not finite"):
        evaluate_task(clip, task)


# --- writing the glyphs ---------------------------------------------------------------------------------------


def test_glyph_tasks_are_the_test_split(glyph_tasks, manifest):
    assert glyph_tasks.keys() == {"glyph-names", "glyph-base-letter", "glyph-retrieval"}
    expected = list(read_samples(manifest, "test"))
    folder = glyph_tasks["glyph-names"]
    names = (folder / "classnames.txt").read_text().splitlines()
    assert names == list(manifest.vocabulary)
    assert (folder / "test" / "nshards.txt").read_text() == "3\n"
    found = []
    for number in range(3):
        with tarfile.open(folder / "test" / f"{number}.tar") as archive:
            members = {name: archive.extractfile(name).read() for name in archive.getnames()}
        keys = sorted({name.partition(".")[0] for name in members})
        found += [(members[f"{key}.png"], names[int(members[f"{key}.cls"])]) for key in keys]
    assert len(found) == len(expected) == 150
    for (image, name), sample in zip(found, expected, strict=True):
        assert Image.open(io.BytesIO(image)).tobytes() == sample.image.tobytes()
        assert name == sample.meta["name"]


def test_glyph_tasks_are_whole_or_absent(manifest, tmp_path, monkeypatch):
    folder = tmp_path / "tasks"
    written = write_glyph_tasks(manifest, folder, shard_size=64)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert write_glyph_tasks(manifest, folder, shard_size=64) == written
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(UserError, match="holds the tasks of other data"):
        write_glyph_tasks(manifest, folder, shard_size=65)
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="choose another folder"):
        write_glyph_tasks(manifest, other)
    assert [path.name for path in other.iterdir()] == ["notes.txt"]
    damaged = manifest.folder.with_name("damaged")
    shutil.copytree(manifest.folder, damaged)
    shard = manifest.splits["test"].shards[-1]
    (damaged / shard.name).write_bytes(bytes(shard.bytes))
    with pytest.raises(UserError, match=r"breaks off|ends before"):
        write_glyph_tasks(type(manifest)(damaged, *list(vars(manifest).values())[1:]), tmp_path / "third")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "tasks"]
