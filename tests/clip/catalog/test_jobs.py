"""The work of a scan: what the sources name, and a journal of what was done."""

import dataclasses

import pytest
from tars import write_shards

from experiments.clip.catalog.jobs import Journal, jobs_of
from experiments.clip.catalog.scan import CHUNK, ScanJob, Shard
from experiments.clip.catalog.sources import Synthetic, Table, TarPattern
from experiments.clip.errors import UserError

KEYS = ("png",), ("txt",)


def jobs(sources, folder, *, pipes=False, checksums=False):
    return list(jobs_of(sources, folder, *KEYS, pipes, None, checksums))


def test_every_file_is_a_job_of_its_source_and_made_up_pairs_are_none(tmp_path):
    paths = write_shards(tmp_path / "data", [2, 1])
    (tmp_path / "t.csv").write_text("filepath,title\na.png,one\n")
    sources = [Synthetic(CHUNK + 5, 8), TarPattern(f"{tmp_path}/data/*.tar"), Table(str(tmp_path / "t.csv"))]
    found = jobs(sources, tmp_path)
    assert [number for number, _ in found] == [0, 1, 1, 2]
    assert [shard.samples for shard in found[0][1]] == [CHUNK, 5]
    assert all(isinstance(job, ScanJob) for _, job in found[1:])
    assert [job.path for _, job in found[1:]] == [*map(str, paths), str(tmp_path / "t.csv")]
    assert found[1][1].stamp == (paths[0].stat().st_size, paths[0].stat().st_mtime_ns)
    with pytest.raises(UserError, match=r"00000\.tar is listed twice"):
        jobs([sources[1], TarPattern(str(paths[0]))], tmp_path)


def test_a_job_is_named_after_all_that_its_result_depends_on(tmp_path):
    [path] = write_shards(tmp_path, [2])
    [(_, job)] = jobs([TarPattern(str(path))], tmp_path)
    others = [{"stamp": (1, 2)}, {"caption_keys": ("json:x",)}, {"image_keys": ("jpg",)}, {"checksums": True}]
    names = {dataclasses.replace(job, **other).name for other in others}
    assert len(names | {job.name}) == 5
    assert dataclasses.replace(job, folder=tmp_path / "elsewhere").name == job.name


def test_a_command_is_run_once_and_only_where_that_is_allowed(tmp_path):
    write_shards(tmp_path, [2])
    source = TarPattern(f"pipe:echo x >> {tmp_path}/runs; cat {tmp_path}/00000.tar")
    with pytest.raises(UserError, match="would run a shell command"):
        jobs([source], tmp_path)
    first, second = (jobs([source], tmp_path, pipes=True) for _ in range(2))
    assert first == second and (tmp_path / "runs").read_text() == "x\n"
    with pytest.raises(UserError, match="ended with 3"):
        jobs([TarPattern("pipe:exit 3")], tmp_path, pipes=True)
    assert len(list((tmp_path / "pipes").iterdir())) == 1


def test_the_journal_has_finished_jobs_whose_files_are_there(tmp_path):
    kept, lost = (Shard("tar", "x.tar", 10, 1, index=f"{name}.npy", index_bytes=3) for name in ("kept", "lost"))
    for name in ("kept", "lost"):
        (tmp_path / f"{name}.npy").write_bytes(b"abc")
    journal = Journal(tmp_path)
    journal.add("a", [kept])
    journal.add("b", [lost])
    with (tmp_path / "journal.jsonl").open("ab") as file:
        file.write(b'["c", [{"kind": "ta')  # the process was killed
    assert Journal(tmp_path).done == {"a": [kept], "b": [lost]}
    (tmp_path / "lost.npy").write_bytes(b"ab")
    again = Journal(tmp_path)
    again.add("d", [kept])
    assert Journal(tmp_path).done == {"a": [kept], "d": [kept]}
