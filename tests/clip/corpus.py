"""Damaged shards, made from intact ones: cuts, flipped bytes, false headers, hostile contents."""

import io
import itertools
import json
import signal
import struct
import tarfile
import time
import zlib
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin
from webdataset.tariterators import base_plus_ext

BLOCK = 512
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
IMAGE_TYPES = ("jpg", "jpeg", "png", "webp")
CAPTION_TYPES = ("txt", "json")
# CPU time of this process for one input, and by the clock, after which an input is taken to wait for ever.
SECONDS, HANG = 5, 60


@contextmanager
def no_hang():
    """Fail if the block takes too long."""

    def raise_hang(number, frame):
        raise AssertionError(f"not done after {HANG} s")

    before = signal.signal(signal.SIGALRM, raise_hang)
    signal.setitimer(signal.ITIMER_REAL, HANG)
    started = time.process_time()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.process_time() - started < SECONDS


def image(number=0, kind="PNG", mode="RGB", size=None, **options):
    """Its width is 8 + number, which compression keeps."""
    stream = io.BytesIO()
    Image.new("RGB", size or (8 + number, 8), (40, 90, 200)).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def sample(number, key=None, kind="PNG"):
    key = f"{number:04d}" if key is None else key
    suffix = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}[kind]
    caption = f"caption {number}"
    return [
        (f"{key}.{suffix}", image(number, kind)),
        (f"{key}.txt", caption.encode()),
        (f"{key}.json", json.dumps({"caption": caption}).encode()),
    ]


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def archive(members, format=tarfile.GNU_FORMAT):
    """Members are (name, bytes), or TarInfo objects without content."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format, encoding="utf-8", errors="surrogateescape") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return stream.getvalue()


def victim(format):
    """Four samples of three image formats, a folder, and a sample whose image is a link."""
    long_key = "d" * 60 + "/" + "k" * 60 + "é"
    return archive(
        [
            *sample(0),
            *sample(1, kind="JPEG"),
            special("folder", tarfile.DIRTYPE),
            *sample(2, long_key, "WEBP"),
            special("link.png", tarfile.SYMTYPE, "/etc/passwd"),
            ("link.txt", b"x"),
            *sample(3),
        ],
        format,
    )


VICTIMS = {name: victim(format) for name, format in FORMATS.items()}


def sealed(data, header, field, value):
    """Put bytes into a header, from ``field`` on, with a valid checksum, so that it is accepted."""
    data = bytearray(data)
    block = bytearray(data[header : header + BLOCK].ljust(BLOCK, b"\0"))
    block[field : field + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:BLOCK])
    data[header : header + BLOCK] = block[:BLOCK]
    return bytes(data)


def extended(record, kind=tarfile.XHDTYPE):
    """An extended header, whatever its records."""
    info = tarfile.TarInfo("extended")
    info.type, info.size = kind, len(record)
    return info.tobuf(tarfile.GNU_FORMAT) + record.ljust(-(-len(record) // BLOCK) * BLOCK, b"\0")


def pax(key, value):
    """A complete record of an extended header."""
    length = len(key) + len(value) + 3
    while len(str(length)) + len(key) + len(value) + 3 != length:
        length = len(str(length)) + len(key) + len(value) + 3
    return b"%d %s=%s\n" % (length, key, value)


class Expected(NamedTuple):
    """What another reader finds in a shard: samples and stray members, up to a place."""

    groups: int
    strays: int


def expected(data, end=None):
    """Count samples and members without a type, by Python's tarfile and webdataset's keys, among the members that are
    complete and begin before byte ``end``.
    """
    members = []
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            members += itertools.islice(tar, 1000)
    except (tarfile.TarError, ArithmeticError, ValueError, OSError):
        pass
    names = []
    for member in members:
        has_content = member.isreg() or member.type not in tarfile.SUPPORTED_TYPES
        is_complete = not has_content or member.offset_data + member.size <= len(data)
        if is_complete and not member.isdir() and (end is None or member.offset_data - BLOCK < end):
            names.append(member.name)
    return Expected(*_grouped(names))


def _grouped(names):
    groups = strays = 0
    key, types = None, set()
    for name in names:
        first = name.split("/")[0]
        own, suffix = base_plus_ext(name)
        is_reserved = len(first) >= 4 and first.startswith("__") and first.endswith("__")
        if is_reserved or own is None or suffix is None:
            strays += 1
            continue
        if own != key or suffix.lower() in types:
            groups, types = groups + 1, set()
        key = own
        types.add(suffix.lower())
    return groups, strays


def listed(data):
    """The members of an intact archive, and where its end mark is."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = list(tar)
    return members, -(-stop_of(members[-1]) // BLOCK) * BLOCK


def stop_of(member):
    return member.offset_data + (member.size if member.isreg() else 0)


def cuts(data):
    """Lengths that end within and at the edges of every header, content, filling and of the end mark."""
    lengths = {0, 1, len(data) - 1}
    members, end = listed(data)
    for member in members:
        start, stop = member.offset_data, stop_of(member)
        filled = -(-stop // BLOCK) * BLOCK
        # member.offset is where its extended headers begin.
        for header in {*range(member.offset, start, BLOCK)}:
            lengths |= {header, header + 1, header + 100, header + 124, header + 150, header + 157, header + 511}
        lengths |= {start, start + 1, (start + stop) // 2, stop - 1, stop, stop + 1, (stop + filled) // 2, filled - 1}
    lengths |= {end, end + 1, end + 511, end + 512, end + 513, end + 1023, end + 1024, end + 1025}
    return sorted(length for length in lengths if 0 <= length < len(data))


HEADERS = {name: [member.offset_data - BLOCK for member in listed(data)[0]] for name, data in VICTIMS.items()}


SIZE_FIELDS = [
    b"\xff" * 12,
    b"\xff" * 11 + b"\0",
    b"\xff" + bytes(11),
    b"\x80" + b"\x7f" * 11,
    b"\x80" + bytes(10) + b"\x08",
    b"\x80" + bytes(11),
    b"\x81" + bytes(11),
    b"77777777777\0",
    b"777777777777",
    b"notoctal\0\0\0\0",
    b"00000000008\0",
    b"-0000000001\0",
    b" " * 12,
    bytes(12),
    b"0x000000010\0",
    b"00000000_10\0",
    b"00000000000\0",
    b"00000000001\0",
    b"00000001000\0",
    b"00000001001\0",
    b"00000003000\0",
    b"\xd9\xa1" * 6,
]

# Where the fields of a header are: mode, owner, group, time, link, magic, version, device, prefix.
OTHER_FIELDS = {
    field: values
    for place, width in [(100, 8), (108, 8), (116, 8), (136, 12), (157, 100), (257, 8), (329, 8), (337, 8), (345, 155)]
    for field, values in [(place, [b"\xff" * width, b"z" * width, bytes(width), b"\x80" + b"\x01" * (width - 1)])]
}

NAMES = [
    b"",
    b".",
    b"..",
    b"...",
    b"/",
    b"//",
    b".png",
    b"..png",
    b"...png",
    b"a.",
    b"a..",
    b"a..png",
    b"plain",
    b"a/",
    b"a/.png",
    b"a.b/.png",
    b"a.b/c",
    b"a.b/c.png",
    b"./a.png",
    b"././a.png",
    b".//a.png",
    b"/absolute.png",
    b"//absolute.png",
    b"../up.png",
    b"a/../../up.png",
    b"..\\up.png",
    b"a\\..\\up.png",
    b"C:\\x.png",
    b"line\nfeed.png",
    b"\n.png",
    b"a.png\n",
    b"\ttab.png",
    b"\x1b[2J.png",
    b"\x7f.png",
    b"\xff\xfe.png",
    b"\xc3.png",
    b"\xed\xa0\x80.png",
    "\u202egnp.a.png".encode(),
    "\ufeff.png".encode(),
    b"a b.png",
    b"a.PNG",
    b"A.png",
    b"a.pNg",
    b"0000.png",
    b"0000.PNG",
    b"0000.txt",
    b"0002.png",
    b"__meta__.png",
    b"__meta__",
    b"__a__/0001.png",
    b"____.png",
    b"__.png",
    b"a.png/",
    b"a.tar/b.png",
    b"a.png.exe",
    b"a.jpg.png",
    b"$(touch x).png",
    b"`touch x`.png",
    b";touch x;.png",
    b"pipe:touch x.png",
    b"http://localhost/x.png",
    b"file:///etc/passwd.png",
    b"%s%n.png",
    b"{0..9}.png",
    b"*.png",
    b"a.png",
]
LONG_NAMES = [
    b"n" * 5000 + b".png",
    b"n" * 10_000,
    b"d/" * 5000 + b"a.png",
    b"a." + b"p" * 10_000,
    b"." * 10_000,
    b"../" * 3000 + b"a.png",
    "é".encode() * 5000 + b".png",
    b"\xff" * 5000 + b".png",
    b"n" * 4092 + b".png",
    b"n" * 4093 + b".png",
]

RECORDS = [
    b"",
    b"\0",
    b"\0" * 600,
    b"5 path=a\n",
    b"99999 path=a\n",
    b"99999999 path=a\n",
    b"path=a\n",
    b"0 a=b\n",
    b"-9 a=bcd\n",
    b"+9 a=bcd\n",
    b" 9 a=bcd\n",
    b"9 a=bcde",
    b"8 a=bc\n\n",
    b"6 =bc\n",
    b"4 a\n\n",
    b"1" * 4000,
    b"\xd9\xa9 a=bc\n",
    b"\xff\xff\xff\xff",
    b"9 a=bcd\n9 a=",
    pax(b"size", b"0"),
    pax(b"size", b"1"),
    pax(b"size", b"-1"),
    pax(b"size", b"1.5"),
    pax(b"size", b"1e3"),
    pax(b"size", b" 7"),
    pax(b"size", b"0x10"),
    pax(b"size", b"99999999999999999999"),
    pax(b"size", b"9" * 5000),
    pax(b"size", "٣".encode()),
    pax(b"size", "²".encode()),
    pax(b"size", b"9223372036854775807"),
    pax(b"size", b"512") + pax(b"size", b"1024"),
    pax(b"path", b"x.txt"),
    pax(b"path", b"/etc/passwd.png"),
    pax(b"path", b"a\0b.png"),
    pax(b"path", b"../" * 2000 + b"x.png"),
    pax(b"path", b"n" * 10_000 + b".png"),
    pax(b"path", b"n" * 70_000 + b".png"),
    pax(b"path", b"\xff\xfe.png"),
    pax(b"path", b"=.png"),
    pax(b"path", b"line\nfeed.png"),
    pax(b"linkpath", b"/etc/passwd"),
    pax(b"hdrcharset", b"BINARY") + pax(b"path", b"\xff.png"),
    pax(b"hdrcharset", b"no such") + pax(b"path", b"x.png"),
    pax(b"mtime", b"nan"),
    pax(b"mtime", b"inf"),
    pax(b"mtime", b"1e999"),
    pax(b"uid", b"no number"),
    pax(b"uname", b"\xff"),
    pax(b"comment", b"c" * 60_000),
    pax(b"\xff", b"\xff"),
    b"".join(pax(b"k%d" % i, b"v") for i in range(4000)),
    pax(b"path", b"x.txt") * 1000,
]


def png(width, height, mode=(8, 2), pixels=b"", chunks=()):
    """A PNG file of these parts: ``mode`` is depth and color type, ``pixels`` are compressed."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, *mode, 0, 0, 0))
    middle = b"".join(chunk(kind, data) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + header + middle + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def blank_png(width, height):
    """A complete image of one bit per pixel."""
    return png(width, height, (1, 0), zlib.compress(bytes((-(-width // 8) + 1) * height), 9))


def jpeg(width, height, scans=0):
    """A progressive JPEG whose header says this size, with its last scan repeated."""
    data = bytearray(image(kind="JPEG", size=(16, 16), progressive=True))
    frame = data.index(b"\xff\xc2")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    last = data[data.rindex(b"\xff\xda") : -2]
    return bytes(data[:-2] + last * scans + data[-2:])


def webp(width, height):
    """A lossless WebP whose header says this size, less one, in 14 bits each."""
    data = bytearray(image(kind="WEBP", lossless=True))
    start = data.index(b"VP8L") + 9
    bits = struct.unpack_from("<I", data, start)[0] >> 28 << 28
    struct.pack_into("<I", data, start, bits | (height - 1) << 14 | (width - 1))
    return bytes(data)


def _animated(kind):
    frames = [Image.new("RGB", (9, 9), (shade, 0, 0)) for shade in (0, 100, 200)]
    stream = io.BytesIO()
    frames[0].save(stream, kind, save_all=True, append_images=frames[1:])
    return stream.getvalue()


def _noise(mode, kind, size=(9, 9), **options):
    generator = np.random.default_rng(0)
    shape = (size[1], size[0], *{"L": (), "RGB": (3,), "RGBA": (4,), "CMYK": (4,), "LA": (2,), "P": ()}[mode])
    values = generator.integers(0, 256, shape, dtype=np.uint8)
    drawn = Image.frombytes(mode, size, values.tobytes())
    if mode == "P":
        drawn.putpalette(generator.integers(0, 256, 768, dtype=np.uint8).tobytes())
    stream = io.BytesIO()
    drawn.save(stream, kind, **options)
    return stream.getvalue()


def _sixteen_bits():
    stream = io.BytesIO()
    Image.fromarray(np.arange(81, dtype=np.uint16).reshape(9, 9) * 800).save(stream, "PNG")
    return stream.getvalue()


def _text_bomb():
    info = PngImagePlugin.PngInfo()
    info.add_text("bomb", "0" * 8_000_000, zip=True)
    return image(pnginfo=info)


EXIF = b"Exif\0\0MM\0*" + b"\xff" * 40
SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
BAD, BIG, LONG = "unreadable image", "too many pixels", "extreme aspect ratio"

# Contents of a .png or .jpg, and the expected outcome: "" for a delivered image, a reason, or None for either.
IMAGES = {
    "1x1": (image(size=(1, 1)), ""),
    "1x1 jpeg": (image(kind="JPEG", size=(1, 1)), ""),
    "1x1 webp": (image(kind="WEBP", size=(1, 1)), ""),
    "1x200": (image(size=(1, 200)), ""),
    "200x1": (image(size=(200, 1)), ""),
    "1x201": (image(size=(1, 201)), LONG),
    "65535x1": (image(size=(65_535, 1)), LONG),
    "30000x30000 header": (png(30_000, 30_000), BIG),
    "30000x30000": (blank_png(30_000, 30_000), BIG),
    "30000x30000 jpeg": (jpeg(30_000, 30_000), BIG),
    "16383x16383 webp": (webp(16_383, 16_383), BIG),
    "8192x8193": (blank_png(8192, 8193), BIG),
    "2^31-1": (png(2**31 - 1, 2**31 - 1), BIG),
    "2^31-1 wide": (png(2**31 - 1, 1), BIG),
    "2^32-1": (png(2**32 - 1, 2**32 - 1), None),
    "0x9": (png(0, 9), None),
    "0x0": (png(0, 0), None),
    "0x9 jpeg": (jpeg(0, 9), None),
    "many scans": (jpeg(8000, 8000, 2000), BIG),
    "no pixels": (png(9, 9), None),
    "too few pixels": (png(9, 9, pixels=zlib.compress(b"0")), None),
    "too many bytes of pixels": (png(9, 9, pixels=zlib.compress(bytes(10**7))), None),
    "no zlib": (png(9, 9, pixels=b"no zlib"), None),
    "depth 3": (png(9, 9, (3, 2)), BAD),
    "color type 9": (png(9, 9, (8, 9)), BAD),
    "palette without a palette": (png(9, 9, (8, 3), zlib.compress(bytes(90))), None),
    "text bomb": (_text_bomb(), None),
    "profile bomb": (png(9, 9, chunks=[(b"iCCP", b"x\0\0" + zlib.compress(bytes(10**7)))]), None),
    "bad profile": (png(9, 9, chunks=[(b"iCCP", b"x" * 99)]), None),
    "bad exif chunk": (png(9, 9, chunks=[(b"eXIf", b"\xff" * 99)]), None),
    "bad animation": (png(9, 9, chunks=[(b"acTL", b"\xff" * 8), (b"fcTL", b"\xff" * 26)]), None),
    "many chunks": (png(9, 9, chunks=[(b"abCd", b"")] * 20_000), None),
    "short chunks": (png(9, 9, chunks=[(kind, b"") for kind in (b"PLTE", b"tRNS", b"pHYs", b"gAMA", b"cHRM")]), None),
    "empty": (b"", BAD),
    "zeros": (bytes(5000), BAD),
    "magic of png": (b"\x89PNG\r\n\x1a\n", BAD),
    "magic of jpeg": (b"\xff\xd8\xff", BAD),
    "jpeg without end": (b"\xff\xd8" + b"\xff" * 5000, BAD),
    "magic of webp": (b"RIFF\xff\xff\xff\xffWEBPVP8 ", BAD),
    "gif": (image(kind="GIF"), BAD),
    "animated gif": (_animated("GIF"), BAD),
    "bmp": (image(kind="BMP"), BAD),
    "tiff": (image(kind="TIFF"), BAD),
    "ppm": (image(kind="PPM"), BAD),
    "ico": (image(kind="ICO"), BAD),
    "tga": (image(kind="TGA"), BAD),
    "jpeg 2000": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(100), BAD),
    "avif": (b"\0\0\0\x1cftypavif" + bytes(100), BAD),
    "svg": (SVG, BAD),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", BAD),
    "pdf": (b"%PDF-1.7\n", BAD),
    "html": (b"<html>404</html>", BAD),
    "a tar": (archive(sample(0)), BAD),
    "animated webp": (_animated("WEBP"), ""),
    "animated png": (_animated("PNG"), ""),
    "mpo": (_animated("MPO"), ""),
    "cmyk": (_noise("CMYK", "JPEG"), ""),
    "gray jpeg": (_noise("L", "JPEG"), ""),
    "progressive": (_noise("RGB", "JPEG", progressive=True), ""),
    "alpha": (_noise("RGBA", "PNG"), ""),
    "gray and alpha": (_noise("LA", "PNG"), ""),
    "alpha webp": (_noise("RGBA", "WEBP"), ""),
    "palette": (_noise("P", "PNG"), ""),
    "transparent palette": (_noise("P", "PNG", transparency=bytes(range(256))), ""),
    "transparent color": (_noise("P", "PNG", transparency=3), ""),
    "16 bits": (_sixteen_bits(), ""),
    "1 bit": (blank_png(9, 9), ""),
    "exif of noise": (image(kind="JPEG", exif=EXIF), ""),
    "exif of noise in png": (image(exif=EXIF), ""),
    "exif of noise in webp": (image(kind="WEBP", exif=EXIF), ""),
    "comment": (image(kind="JPEG", comment=b"\0" * 60_000), ""),
    "trailing bytes": (image() + bytes(9000), ""),
    "leading bytes": (b"\n" + image(), BAD),
}

# Images of every coding that is damaged at random.
BASES = [
    _noise("RGB", "PNG"),
    _noise("P", "PNG", transparency=bytes(range(256))),
    _sixteen_bits(),
    _animated("PNG"),
    _noise("RGB", "JPEG"),
    _noise("CMYK", "JPEG"),
    _noise("RGB", "JPEG", progressive=True, exif=EXIF),
    _animated("MPO"),
    _noise("RGB", "WEBP"),
    _noise("RGBA", "WEBP", lossless=True),
    _animated("WEBP"),
]

EMPTY, INVALID, MUCH = "empty caption", "invalid caption", "too many bytes"
TEXTS = {
    "empty": (b"", EMPTY),
    "spaces": (b" \t\r\n", EMPTY),
    "other spaces": ("\u2003\u3000\x85\u2028".encode(), EMPTY),
    "2 MiB": (b"x" * 2**21, MUCH),
    "2 MiB and no text": (b"\xff" * 2**21, MUCH),
    "over 1 MiB": (b"x" * (2**20 + 1), MUCH),
    "1 MiB of words": (b"word " * (2**20 // 5), ""),
    "1 MiB without a space": (b"x" * 2**20, ""),
    "1 MiB of letters": (np.random.default_rng(0).integers(97, 123, 2**20, dtype=np.uint8).tobytes(), ""),
    "512 KiB of accents": (("e" + "\u0301" * 2**18).encode(), ""),
    "1 MiB of entities": (b"&amp;" * 200_000, ""),
    "far behind spaces": (b" " * 100_000 + b"x", ""),
    "invalid": (b"\xff\xfe", INVALID),
    "invalid at the end": (b"good \xc3", INVALID),
    "overlong": (b"\xc0\xaf", INVALID),
    "surrogate": (b"\xed\xa0\x80", INVALID),
    "beyond Unicode": (b"\xf4\x90\x80\x80", INVALID),
    "latin": ("é".encode("latin-1"), INVALID),
    "utf-16": ("caption".encode("utf-16"), INVALID),
    "utf-32": ("caption".encode("utf-32"), INVALID),
    "nul": (b"\0", ""),
    "nul within": (b"a\0b", ""),
    "controls": (bytes(range(1, 32)) + b"\x7f", ""),
    "mark": ("\ufeffcaption".encode(), ""),
    "right to left": ("\u202ecaption".encode(), ""),
    "not a character": ("\uffff\U0010ffff".encode(), ""),
    "emoji": ("👩‍👩‍👧‍👦🏳️‍🌈".encode(), ""),
    "start of text": (b"<start_of_text><end_of_text>", ""),
    "entities": (b"&#0;&#xD800;&#x110000;&bogus;&amp;amp;amp;", ""),
    "format": (b"%s %n {0} {x!r} $(touch x) `touch x`", ""),
    "broken twice": ("Ã©â€™Ã".encode(), ""),
}
JSONS = {
    "text": (b'{"caption": "x"}', ""),
    "list": (b'{"caption": ["x", "", "y"]}', ""),
    "duplicate": (b'{"caption": 3, "caption": "x"}', ""),
    "duplicate that is none": (b'{"caption": "x", "caption": 3}', INVALID),
    "escapes": (b'{"caption": "\\u0000\\ud83d\\ude00"}', ""),
    "half a pair": (b'{"caption": "\\ud83d"}', INVALID),
    "half a pair in a list": (b'{"caption": ["x", "\\udc00"]}', ""),
    "half a pair elsewhere": (b'{"caption": "x", "other": "\\ud83d"}', ""),
    "empty text": (b'{"caption": ""}', EMPTY),
    "empty list": (b'{"caption": []}', EMPTY),
    "list of empty": (b'{"caption": ["", " "]}', EMPTY),
    "null": (b'{"caption": null}', INVALID),
    "number": (b'{"caption": 1}', INVALID),
    "true": (b'{"caption": true}', INVALID),
    "nan": (b'{"caption": NaN}', INVALID),
    "infinity": (b'{"caption": -Infinity}', INVALID),
    "nan elsewhere": (b'{"caption": "x", "other": NaN}', ""),
    "1e999": (b'{"caption": 1e999}', INVALID),
    "object": (b'{"caption": {"x": "y"}}', INVALID),
    "list in a list": (b'{"caption": [["x"]]}', INVALID),
    "list with a number": (b'{"caption": ["x", 1]}', ""),
    "no field": (b'{"Caption": "x"}', INVALID),
    "a list": (b'["caption"]', INVALID),
    "a text": (b'"caption"', INVALID),
    "a number": (b"1", INVALID),
    "null itself": (b"null", INVALID),
    "nothing": (b"", INVALID),
    "no end": (b'{"caption": "x"', INVALID),
    "two": (b'{"caption": "x"}{"caption": "y"}', INVALID),
    "comma": (b'{"caption": "x",}', INVALID),
    "quotes": (b"{'caption': 'x'}", INVALID),
    "control": (b'{"caption": "a\nb"}', INVALID),
    "escape": (b'{"caption": "\\x41"}', INVALID),
    "mark": (b'\xef\xbb\xbf{"caption": "x"}', ""),
    "invalid": (b'{"caption": "\xff"}', INVALID),
    "nul": (b'{"caption": "x"}\0', INVALID),
    "deep": (b"[" * 500_000, INVALID),
    "deep and closed": (b'{"caption": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", INVALID),
    "deep objects": (b'{"caption":' * 50_000, INVALID),
    "digits": (b'{"caption": ' + b"9" * 1_000_000 + b"}", INVALID),
    "digits elsewhere": (b'{"caption": "x", "other": ' + b"9" * 4000 + b"}", ""),
    "many fields": (b'{"caption": "x"' + b"".join(b',"%d":0' % n for n in range(60_000)) + b"}", ""),
    "long list": (b'{"caption": [' + b'"x",' * 100_000 + b'"x"]}', ""),
    "2 MiB": (b'{"caption": "' + b"x" * 2**21 + b'"}', MUCH),
    "pickle": (b"\x80\x04\x95", INVALID),
}
