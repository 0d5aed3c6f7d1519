"""Icons as a data set: what is left out is counted, drawings and names do not leak, and a command makes it."""

import dataclasses
import hashlib
import json

import pytest
from icon_archive import icon_set, write_archive

from experiments.clip.cli.options import Data
from experiments.clip.errors import UserError
from experiments.clip.glyphs.dataset import read_samples, verify
from experiments.clip.icons.package import VERSION
from experiments.clip.icons.source import prepare
from experiments.clip.run import main

pytest.importorskip("resvg_py", reason="icons are drawn by resvg_py, of the extra icons")


def pairs_of(manifest, split):
    return list(read_samples(manifest, split))


def test_pairs_have_pictures_captions_and_what_is_known_of_them(manifest):
    verify(manifest)
    pairs = [pair for split in manifest.splits for pair in pairs_of(manifest, split)]
    assert {pair.image.size for pair in pairs} == {(16, 16)}
    assert all(pair.caption == pair.meta["name"] == pair.caption.removesuffix(" filled") for pair in pairs)
    assert all(set(pair.meta) >= {"name", "set", "kind", "license", "icon"} for pair in pairs)
    assert any(pair.meta.get("categories") == ["Letters"] for pair in pairs if pair.meta["set"] == "four")
    assert set(manifest.vocabulary) == {pair.caption for pair in pairs}


def test_pools_share_no_name_no_set_and_no_picture(manifest):
    found = {split: pairs_of(manifest, split) for split in manifest.splits}
    assert all(found.values())
    names, sets = ({split: {pair.meta[key] for pair in found[split]} for split in found} for key in ("name", "set"))
    assert not names["train"] & names["reference"]
    seen: dict[bytes, str] = {}
    for split, pairs in found.items():
        for other in found:
            assert split == other or not sets[split] & sets[other]
        for pair in pairs:
            assert seen.setdefault(hashlib.sha256(pair.image.tobytes()).digest(), pair.key) == pair.key


def test_what_is_left_out_is_counted_by_reason_and_nothing_is_lost(manifest):
    left_out = json.loads((manifest.folder / "left_out.json").read_text())
    assert left_out["license CC-BY-NC-4.0"] == 5
    assert left_out["unsafe"] == 3
    assert left_out["no name"] == 1
    assert left_out["empty"] >= 1
    assert left_out["the same picture as another"] >= 1
    kept = sum(split.samples for split in manifest.splits.values())
    assert kept + sum(left_out.values()) == 128 + 65 + 40 + 30 + 12 + 8 + 5 + 3 + 5


def test_every_set_is_attributed(manifest):
    text = (manifest.folder / "ATTRIBUTION.md").read_text()
    assert "| Three (`three`) |" in text
    assert "[CC-BY-4.0](https://example.org/license)" in text
    assert "closed" not in text


def test_it_is_the_same_on_another_day_and_reused(archive, manifest, tmp_path, capsys):
    again = prepare(Data(kind="icons", cache=tmp_path, pixels=16), archive)
    assert again.fingerprint == manifest.fingerprint
    assert not (tmp_path / "icon-pictures").exists()
    capsys.readouterr()
    prepare(Data(kind="icons", cache=tmp_path, pixels=16))  # without the archive
    assert "reusing" in capsys.readouterr().out
    other = write_archive(tmp_path / "other.tgz", {"one": icon_set(["a"])}, version="9.9.9")
    with pytest.raises(UserError, match=r"package is '1\.2\.3' there and '9\.9\.9' here"):
        prepare(Data(kind="icons", cache=tmp_path, pixels=16), other)


def test_a_share_of_the_training_names_is_exchanged_and_nothing_else(icon_data, manifest):
    data = dataclasses.replace(icon_data, swapped=0.4)
    swapped = prepare(data)
    verify(swapped)
    assert swapped.fingerprint != manifest.fingerprint
    for split in manifest.splits:
        before, after = pairs_of(manifest, split), pairs_of(swapped, split)
        assert [(pair.key, pair.image.tobytes(), pair.meta) for pair in before] == [
            (pair.key, pair.image.tobytes(), pair.meta) for pair in after
        ]
        moved = sum(old.caption != new.caption for old, new in zip(before, after, strict=True))
        assert moved > 0.2 * len(before) if split == "train" else moved == 0
        assert sorted(pair.caption for pair in before) == sorted(pair.caption for pair in after)
    assert (swapped.folder / "ATTRIBUTION.md").read_bytes() == (manifest.folder / "ATTRIBUTION.md").read_bytes()
    assert prepare(data).fingerprint == swapped.fingerprint


def test_the_command_makes_them_and_refuses_what_has_no_part_in_glyphs(archive, tmp_path, capsys):
    words = ["prepare", "--source", str(archive), "--pixels", "16", "--cache", str(tmp_path)]
    assert main([*words, "--data", "icons"]) == 0
    assert "left out" in capsys.readouterr().out
    assert (tmp_path / "icons-16-full" / "manifest.json").is_file()
    assert main(words) == 2
    assert "it is for --data icons" in capsys.readouterr().err


def test_a_packed_archive_gives_the_same_data_set(archive, manifest, tmp_path, capsys):
    packed = tmp_path / "packed" / f"iconify-json-{VERSION}.tar.xz"
    words = ["prepare", "--data", "icons"]
    assert main([*words, "--source", str(archive), "--pack", str(packed)]) == 0
    assert f"wrote {packed}, 0.0 MB, for --source" in " ".join(capsys.readouterr().out.split())
    elsewhere = prepare(Data(kind="icons", cache=packed.parent, pixels=16))  # found where npm would have put it
    assert elsewhere.fingerprint == manifest.fingerprint
    for name in ("left_out.json", "ATTRIBUTION.md"):
        assert (elsewhere.folder / name).read_bytes() == (manifest.folder / name).read_bytes()
    again = tmp_path / "again.tar.xz"
    assert main([*words, "--source", str(packed), "--pack", str(again)]) == 0
    assert again.read_bytes() == packed.read_bytes()


def test_only_icons_are_packed(tmp_path, capsys):
    pack = ["prepare", "--pack", str(tmp_path / "packed.tar.xz")]
    assert main(pack) == 2
    assert "--pack" in capsys.readouterr().err
    for words in (["--pixels", "32"], ["--size", "small"], ["--swapped", "0.2"]):
        assert main([*pack, "--data", "icons", *words]) == 2
        assert f"{words[0]} {words[1]} has no part" in capsys.readouterr().err
