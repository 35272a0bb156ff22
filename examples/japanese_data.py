"""Rendered Japanese characters: hiragana and JIS level-1 kanji from pen strokes and typefaces.

The images are rendered, not scanned: shapes drawn once by their designers, then distorted at random. They stand in for the
ETL character databases (http://etlcdb.db.aist.go.jp), whose scans need an account; an accuracy on them says nothing
about scanned handwriting.

Sources, all of them free:

- KanjiVG by Ulrich Apel, CC BY-SA 3.0 (https://kanjivg.tagaini.net): the strokes of every character as a pen draws them, from the
  wheel ``kanjivg`` on PyPI. Every image is a fresh pen: moved control points, another width. The wheel stays zipped in the cache.
- IPAexGothic, IPA Font License v1.0, inside ``japanize-matplotlib`` on PyPI, which need not be importable.
- The typefaces of ``TRAIN_FACES`` and ``TEST_FACES`` found in the font folders, free under various licenses. Debian's packages:
  fonts-ipaexfont-gothic fonts-ipaexfont-mincho fonts-vlgothic fonts-mplus fonts-horai-umefont fonts-motoya-l-cedar
  fonts-motoya-l-maruberi fonts-dejima-mincho (print), fonts-kiloji fonts-seto fonts-yozvox-yozfont-standard-kana (handwriting),
  fonts-aoyagi-soseki fonts-aoyagi-kouzan-t fonts-kouzan-mouhitsu (brush).

The split is by typeface. ``TEST_FACES`` are never trained on; KanjiVG and ``TRAIN_FACES`` are never tested on, with one exception:
where no handwriting or brush face of ``TEST_FACES`` is installed (so with pip alone), KanjiVG under stronger distortion and other random numbers
is tested too. That part measures robustness to distortion, not to another hand: read its accuracy beside IPAexGothic's.
With pip alone KanjiVG is the only training design, so ask for more images of it (``train_per_face=20`` or more).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from scipy.ndimage import map_coordinates

HIRAGANA = tuple(c for c in map(chr, range(ord("ぁ"), ord("ん") + 1)) if c not in "ぁぃぅぇぉっゃゅょゎゐゑ")  # 71 with voiced

TRAIN_FACES = (  # file names without suffix
    *("VL-Gothic-Regular", "Mplus1-Regular", "Mplus1-Black", "ume-tgo4", "MTLc3m", "MTLmr3m"),  # gothic and rounded print
    *("ume-tmo3", "dejima-mincho-r227"),  # mincho print
    *("kiloji", "kiloji_b", "YOzRS_"),  # handwriting
    *("aoyagi-soseki", "AoyagiKouzanT", "kouzan-mouhitsu"),  # brush
)
HANDWRITTEN_TEST_FACES = ("setofont", "kouzan-mouhitsu-gyosho")  # a pen; a semi-cursive brush, the hardest
TEST_FACES = ("ipaexg", "ipaexm", *HANDWRITTEN_TEST_FACES)  # gothic, mincho

FONT_FOLDERS = (Path("/usr/share/fonts"), Path("/usr/local/share/fonts"), Path.home() / ".local/share/fonts")
KANJIVG_VARIABLE = "TAYLORFX_KANJIVG"
KANJIVG_BOX = 109  # side of KanjiVG's drawing box
SOURCE, SAMPLE = 3, 2  # designs are drawn at 3x the image's size and sampled at 2x, then averaged: anti-aliasing


@dataclass(frozen=True)
class Characters:
    """Images ordered by class; shuffle before training.

    Attributes:
        images: uint8 ``(N, 1, size, size)``, ink 255 on 0.
        targets: int64 ``(N,)``, positions in ``classes``.
        classes: the characters.
        faces: the designs drawn from: file names of typefaces, or ``"kanjivg"``.
        designs: int64 ``(N,)``, positions in ``faces``, for an accuracy per face.
    """

    images: torch.Tensor
    targets: torch.Tensor
    classes: tuple[str, ...]
    faces: tuple[str, ...]
    designs: torch.Tensor


def alphabet(count: int) -> tuple[str, ...]:
    """The first ``count`` of 71 hiragana and the 2,965 JIS level-1 kanji (EUC-JP rows 16-47, in order): ETL9B's 3,036 classes.

    Raises:
        ValueError: ``count`` is not in 1..3036.
    """
    rows = (bytes([0xA0 + row, cell]) for row in range(16, 48) for cell in range(0xA1, 0xFF))
    characters = HIRAGANA + tuple(filter(None, (code.decode("euc_jp", errors="ignore") for code in rows)))
    if not 1 <= count <= len(characters):
        raise ValueError(f"the alphabet has 1 to {len(characters)} characters, not {count}: ask for fewer classes")
    return characters[:count]


def load(
    classes: int,
    size: int,
    *,
    train_per_face: int,
    test_per_face: int = 2,
    seed: int = 0,
    cache: Path | None = None,
    font_folders: Sequence[Path | str] = FONT_FOLDERS,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Characters, Characters]:
    """Render ``(train, test)``; the same arguments and faces give the same images, kept in ``cache`` as ``.npz``.

    Args:
        classes: number of characters, the first of ``alphabet``.
        size: side of the images in pixels.
        train_per_face: images per character and training face; ``test_per_face`` likewise.
        seed: of every random number.
        cache: folder of downloads and arrays, by default ``~/.cache/taylorfx``.
        font_folders: searched recursively for the typefaces of the module's table; ``()`` for what pip gives alone.
        progress: called with ``("render", characters done, characters in all)``.

    The environment variable ``TAYLORFX_KANJIVG`` may name KanjiVG's folder of SVG files or its wheel; without it the wheel is
    downloaded into ``cache`` once. Where that fails, typefaces alone are used, and a line says so.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: the sources found leave a character without images.
    """
    for name, value, least in (
        ("size", size, 16),
        ("train_per_face", train_per_face, 1),
        ("test_per_face", test_per_face, 1),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    characters = alphabet(classes)
    cache = Path.home() / ".cache" / "taylorfx" if cache is None else Path(cache)
    cache.mkdir(parents=True, exist_ok=True)
    kanjivg, fonts = find_kanjivg(cache), find_fonts(font_folders, cache)
    train = [face for face in ("kanjivg", *TRAIN_FACES) if face in fonts or (face == "kanjivg" and kanjivg)]
    test = [face for face in TEST_FACES if face in fonts]
    if kanjivg and not set(test) & set(HANDWRITTEN_TEST_FACES):
        test.append("kanjivg")
    if not train or not test:
        raise RuntimeError(
            f"rendering needs a face to train on and one to test on, found {train} and {test}: connect to PyPI once, set "
            f"{KANJIVG_VARIABLE}, or install Japanese fonts (the docstring of {Path(__file__).name} lists Debian's)"
        )
    files = {face: path.stat().st_size for face, path in {**fonts, **({"kanjivg": kanjivg} if kanjivg else {})}.items()}
    arguments = [classes, size, train_per_face, test_per_face, seed, train, test, sorted(files.items())]
    key = hashlib.sha256(json.dumps(arguments).encode() + Path(__file__).read_bytes()).hexdigest()[:16]
    stored = cache / f"japanese-{classes}x{size}-{key}.npz"
    if not stored.exists():
        ink = Ink(size, seed, {face: font(path, size) for face, path in fonts.items()}, kanjivg)
        counts = (train, train_per_face, 1.0), (test, test_per_face, 1.0)
        save(stored, render(ink, characters, counts, progress))
    with np.load(stored) as arrays:
        splits = [{name: arrays[f"{split}_{name}"] for name in ("images", "targets", "designs")} for split in ("train", "test")]
    return tuple(
        Characters(classes=characters, faces=tuple(faces), **{name: torch.from_numpy(array) for name, array in split.items()})
        for faces, split in zip((train, test), splits, strict=True)
    )
