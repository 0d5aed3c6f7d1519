"""A run's folder elsewhere: what is copied, in which order, and what comes back."""

import itertools
import time

import fsspec
import pytest

from experiments.clip.errors import UserError
from experiments.clip.io import files
from experiments.clip.io.mirror import Mirror, mirrored

NUMBERS = itertools.count()


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    """Storage in memory, and in another folder, as fsspec reaches both."""
    return f"memory://runs-{next(NUMBERS)}" if request.param == "memory" else f"file://{tmp_path}/there"


def write(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() * 10)


def checkpoint(step):
    return f"checkpoints/step-{step:08d}/part-0-of-1.safetensors", f"checkpoints/step-{step:08d}/manifest.json"


def there(url, folder):
    fs, root = fsspec.core.url_to_fs(f"{url}/{folder.name}")
    fs.invalidate_cache()
    return {name.removeprefix(root).lstrip("/"): fs.cat_file(name) for name in fs.find(root)}


def test_what_is_finished_is_copied_and_what_is_gone_is_removed(url, tmp_path):
    folder = tmp_path / "run [1]"
    write(folder, "log.jsonl", ".claim", "checkpoints/.partial-step-00000020/part-0-of-1.safetensors")
    write(folder, *checkpoint(10), *checkpoint(5), "model/open_clip_model.safetensors", "checkpoints/damaged-step-1/x")
    mirror = Mirror(folder, url)
    mirror.copy()
    copied = {"log.jsonl", *checkpoint(10), *checkpoint(5), "model/open_clip_model.safetensors"}
    assert there(url, folder) == {name: name.encode() * 10 for name in copied}
    for name in checkpoint(5):
        (folder / name).unlink()
    (folder / "checkpoints" / "step-00000005").rmdir()
    write(folder, *checkpoint(15))
    (folder / "log.jsonl").write_text("longer")
    mirror.copy()
    found = there(url, folder)
    assert set(found) == copied - set(checkpoint(5)) | set(checkpoint(15)) and found["log.jsonl"] == b"longer"


def test_a_manifest_is_copied_last(tmp_path):
    folder = tmp_path / "run"
    write(folder, *checkpoint(10))
    mirror = Mirror(folder, f"memory://runs-{next(NUMBERS)}")
    assert [path.name for path in mirror._files()][-1] == "manifest.json"
    mirror.copy()
    manifest = folder / checkpoint(10)[1]
    manifest.write_text("the same step, written anew")
    (folder / checkpoint(10)[0]).write_text("its part")
    order, put = [], mirror._put
    mirror._put = lambda path: (order.append(path.name), put(path))
    mirror.copy()
    assert order == ["part-0-of-1.safetensors", "manifest.json"]


def test_a_run_elsewhere_begins_with_the_last_complete_checkpoint(url, tmp_path):
    folder, again = tmp_path / "a" / "run", tmp_path / "b" / "run"
    write(folder, "log.jsonl", *checkpoint(10), *checkpoint(20), "epoch_3.pt", "model/x", "exports/epoch-1/x")
    (folder / "checkpoints" / "step-00000020" / "manifest.json").unlink()
    lines = []
    with mirrored(folder, url, 0.05, lines.append):
        pass
    with mirrored(again, url, 0.05, lines.append):
        found = {path.relative_to(again).as_posix() for path in again.rglob("*") if path.is_file()}
        assert found == {"log.jsonl", *checkpoint(10)}
        write(again, *checkpoint(30))
        deadline = time.monotonic() + 30
        while not set(checkpoint(30)) <= there(url, again).keys():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert lines == [f"step-00000010 is fetched from {url}"]
    assert Mirror(again, url).fetch() is None  # it has one of its own


def test_an_error_of_the_run_is_not_hidden_by_one_of_the_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WAITS", ())
    lines = []
    with pytest.raises(KeyError), mirrored(tmp_path / "run", f"file://{tmp_path}/there", 60, lines.append):
        write(tmp_path / "run", "log.jsonl")
        (tmp_path / "there").write_text("a file")
        raise KeyError
    assert len(lines) == 1 and "there" in lines[0]


def test_storage_that_cannot_be_written_is_said_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WAITS", ())
    write(tmp_path / "run", "log.jsonl")
    (tmp_path / "there").write_text("a file")
    with pytest.raises(UserError, match="there"), mirrored(tmp_path / "run", f"file://{tmp_path}/there", 60, print):
        raise AssertionError("it began")
    with pytest.raises(UserError, match="nosuch"):
        Mirror(tmp_path / "run", "nosuch://bucket")
