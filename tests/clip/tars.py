"""Small tar files of pairs, made by tarfile and by webdataset's own writer, and what a catalog of them holds."""

import io
import tarfile

import webdataset
from PIL import Image

from experiments.clip.data.reader import Reader, decode


def image_bytes(shade=0, size=(8, 8), kind="PNG"):
    stream = io.BytesIO()
    Image.new("RGB", size, (shade % 256, shade // 256 % 256, 7)).save(stream, kind)
    return stream.getvalue()


def numbered(image):
    """The number that `image_bytes` drew."""
    red, green, _ = image.getpixel((0, 0))
    return red + 256 * green


def write_tar(path, members, format=tarfile.GNU_FORMAT):
    """Members are (name, bytes), or TarInfo objects without content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                name, data = member
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def pair(number, key=None, caption=None):
    key = f"{number:05d}" if key is None else key
    text = f"caption {number}".encode() if caption is None else caption
    return [(f"{key}.png", image_bytes(number)), (f"{key}.txt", text)]


def write_pairs(path, numbers):
    """Write pairs as webdataset does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream, webdataset.TarWriter(stream, encoder=False) as writer:
        for number in numbers:
            caption = f"caption {number}".encode()
            writer.write({"__key__": f"{number:05d}", "png": image_bytes(number), "txt": caption, "json": b"{}"})
    return path


def write_shards(folder, sizes):
    """Shards of these sizes; number i is the i-th pair of all."""
    first = 0
    paths = []
    for shard, size in enumerate(sizes):
        paths.append(write_pairs(folder / f"{shard:05d}.tar", range(first, first + size)))
        first += size
    return paths


def everything(catalog):
    """The numbers and captions of all samples, decoded."""
    reader = Reader(catalog)
    pairs = [decode(reader.read(index)) for index in range(len(catalog))]
    return [(numbered(sample.image), sample.caption) for sample in pairs]


def keys(catalog):
    """The keys of all samples."""
    reader = Reader(catalog)
    return [reader.read(index).key for index in range(len(catalog))]


def expected(numbers):
    """What `everything` returns for these pairs."""
    return [(number, f"caption {number}") for number in numbers]
