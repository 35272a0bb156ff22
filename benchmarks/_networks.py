"""The networks of the quality benchmark, as torch modules, and the real data that they learn.

They are modules, so that other pruners can work on them, too; taylorfx captures them.
"""

from __future__ import annotations

import gzip
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import taylorfx as tfx
from taylorfx.scoring.losses import Loss

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from quickstart import digits
from training import Schedule, accuracy, at_rest, cosine, fit

Examples = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Data:
    """What a network learns, is scored and repaired on, and is judged by. No example is in two of them but that
    ``scored`` are some of what ``learned`` has, as a user would take them."""

    learned: Examples
    scored: Examples
    judged: Examples


@dataclass(frozen=True)
class Task:
    """A network and its data: what differs between the tables of the benchmark.

    Attributes:
        data: draws the examples; it is given the folder of Fashion-MNIST.
        epochs, lr: of the training; a network without epochs is trained already.
        tune: steps of the short fine-tuning after a cut, with a tenth of the training's learning rate; 0 for networks
            that are not trained here at all.
        protect: globs of the scopes that no contestant may touch.
        loss: of outputs and targets, the mean of the batch; networks are trained, and units scored, by it.
        quality: of a network on test examples: a share, higher is better.
        needs: packages without which there is nothing to run.
    """

    title: str
    network: Callable[[], nn.Module]
    data: Callable[[torch.Generator, Path], Data]
    epochs: int = 0
    lr: float = 0.1
    tune: int = 60
    protect: tuple[str, ...] = ()
    loss: Loss = F.cross_entropy
    quality: Callable[[tfx.Params, tfx.Spec, Tensor, Tensor], float] = accuracy
    needs: tuple[str, ...] = ()

    @property
    def taught(self) -> bool:
        """Whether the outputs are logits of classes, so that another network's probabilities can be targets."""
        return self.loss is F.cross_entropy

    def repairs(self, asked: Sequence[str]) -> list[str]:
        """Those of these that can be done: some train, and some of these by a teacher."""
        trains = [x for x in asked if self.tune or not x.endswith(("tuned", "epochs", "teacher"))]
        return [x for x in trains if self.taught or not x.endswith("teacher")]

    def train(self, data: Data, generator: torch.Generator) -> tuple[tfx.Params, tfx.Spec]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            module = self.network().eval()
        params, spec = tfx.from_torch(module, data.learned[0][:2])
        if not self.epochs:
            return params, spec
        return self.fitted(params, spec, data.learned, self.epochs, cosine(self.lr, warmup=0.1), generator), spec

    def tuned(self, params: tfx.Params, spec: tfx.Spec, data: Data, seed: int) -> tfx.Params:
        """After the short fine-tuning: the same examples in the same order for every contestant."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(data.learned[0]), generator=generator)[: 64 * self.tune]
        return self.fitted(params, spec, tuple(x[chosen] for x in data.learned), 1, cosine(self.lr / 10), generator)

    def trained(
        self, params: tfx.Params, spec: tfx.Spec, data: Data, seed: int, epochs: int, teacher: Tensor | None = None
    ) -> tfx.Params:
        """After a long training with the same schedule as at first, from a third of its learning rate.

        Args:
            teacher: what the unpruned network says of the examples; half of the loss is then by its probabilities.

        Raises:
            ValueError: if there is a teacher, and the outputs are not logits of classes.
        """
        images, targets = data.learned
        if teacher is not None:
            if not self.taught:
                raise ValueError(f"A teacher gives probabilities of classes, which the outputs of a {self.title} lack.")
            targets = (F.one_hot(targets, teacher.shape[1]) + teacher.softmax(1)) / 2
        generator = torch.Generator().manual_seed(seed)
        return self.fitted(params, spec, (images, targets), epochs, cosine(self.lr / 3, warmup=0.1), generator)

    def fitted(
        self, params: tfx.Params, spec: tfx.Spec, examples: Examples, epochs: int, lr: Schedule,
        generator: torch.Generator,
    ) -> tfx.Params:  # fmt: skip
        return fit(
            params, at_rest(params, spec), spec, *examples, epochs=epochs, batch_size=64, lr=lr, weight_decay=5e-4,
            generator=generator, loss=self.loss, label=self.title,
        )[0]  # fmt: skip

    def module(self, params: tfx.Params) -> nn.Module:
        """The module with these parameters, in inference mode."""
        module = self.network().eval()
        missing, strange = module.load_state_dict(tfx.tree.flatten(params), strict=False)
        assert not strange, strange
        assert all(name.endswith("num_batches_tracked") for name in missing), missing
        return module


class Before(nn.Module):
    """A residual block with norm and ReLU before its convolutions (He et al. 2016, arXiv 1603.05027)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(before), nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(after), nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False) if before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(y))) + self.shortcut(x)


class After(nn.Module):
    """A residual block as in ResNet-18, norm and ReLU after its convolutions (He et al. 2015, arXiv 1512.03385)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.shortcut = nn.Identity()
        if before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class Inverted(nn.Module):
    """An inverted residual block (Sandler et al. 2018, arXiv 1801.04381): widen, depthwise, narrow."""

    def __init__(self, before: int, after: int, stride: int, widen: int = 4) -> None:
        super().__init__()
        inner = widen * before
        self.conv1, self.bn1 = nn.Conv2d(before, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, after, 1, bias=False), nn.BatchNorm2d(after)
        self.adds = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.bn2(self.conv2(F.relu6(self.bn1(self.conv1(x))))))
        y = self.bn3(self.conv3(y))
        return x + y if self.adds else y


class Stages(nn.Sequential):
    """A stem, three stages of two blocks, average pooling, a linear layer."""

    def __init__(self, block: Callable[[int, int, int], nn.Module], width: int, stride: int, *, bare: bool) -> None:
        def normed(channels: int) -> list[nn.Module]:
            return [nn.BatchNorm2d(channels), nn.ReLU()]

        widths = [width, width, 2 * width, 4 * width]
        blocks = [
            layer
            for k, (before, after) in enumerate(pairwise(widths))
            for layer in (block(before, after, 1 + (k > 0)), block(after, after, 1))
        ]
        super().__init__(
            nn.Conv2d(1, width, 3, stride, 1, bias=False),
            *([] if bare else normed(width)),
            *blocks,
            *(normed(widths[-1]) if bare else []),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(widths[-1], 10),
        )


class Attention(nn.Module):
    """Self-attention by heads of a given width; as many as the layers leave."""

    def __init__(self, width: int, head: int) -> None:
        super().__init__()
        self.head = head
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.head)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    """A transformer block, norms first."""

    def __init__(self, width: int, head: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, head)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Mixer(nn.Module):
    """A block of ConvNeXt (Liu et al. 2022, arXiv 2201.03545): depthwise windows, a norm, widen, narrow, scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.windows, self.norm = nn.Conv2d(width, width, 5, padding=2, groups=width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.windows(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.fc2(F.gelu(self.fc1(y)))).permute(0, 3, 1, 2)


class ConvNeXt(nn.Sequential):
    """A stem, two stages of three blocks, average pooling, a norm, a linear layer."""

    def __init__(self, width: int = 24) -> None:
        super().__init__(
            nn.Conv2d(1, width, 4, 4), ChannelNorm(width), *(Mixer(width) for _ in range(3)),
            ChannelNorm(width), nn.Conv2d(width, 2 * width, 2, 2, padding=1), *(Mixer(2 * width) for _ in range(3)),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(2 * width), nn.Linear(2 * width, 10),
        )  # fmt: skip


class VisionTransformer(nn.Module):
    """Patches, their places, four blocks, the mean over the patches (Dosovitskiy et al. 2020, arXiv 2010.11929)."""

    def __init__(self, width: int = 64, head: int = 8, hidden: int = 128, patch: int = 7) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, patch, patch)
        self.place = nn.Parameter(0.02 * torch.randn(1, (28 // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Encoder(width, head, hidden) for _ in range(4)))
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.place
        return self.linear(self.norm(self.blocks(x)).mean(1))


NOISE = 1.0
"""Of the digits, which go from -1 to 1: as much as makes the network err in about every fifth."""


def noisy_digits(generator: torch.Generator, _: Path) -> Data:
    """scikit-learn's digits, each with several draws of noise."""
    images, targets, test_images, test_targets = digits()

    def noisy(x: Tensor, y: Tensor, times: int) -> Examples:
        x = x.repeat(times, 1, 1, 1)
        return x + NOISE * torch.randn(x.shape, generator=generator), y.repeat(times)

    chosen = torch.randperm(len(images), generator=generator)[:512]
    return Data(
        noisy(images, targets, 16), noisy(images[chosen], targets[chosen], 1), noisy(test_images, test_targets, 2)
    )


FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's ``dataset-fashion-mnist`` puts the IDX files."""


def fashion(generator: torch.Generator, folder: Path, *, learn: int = 12_000, judge: int = 2_000) -> Data:
    """Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747) from its IDX files: some to learn, some of the test's."""

    def read(name: str, header: int) -> Tensor:
        packed = folder / f"{name}.gz"
        content = gzip.decompress(packed.read_bytes()) if packed.exists() else (folder / name).read_bytes()
        return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).copy())

    def some(part: str, count: int) -> Examples:
        images = read(f"{part}-images-idx3-ubyte", 16).reshape(-1, 1, 28, 28)
        targets = read(f"{part}-labels-idx1-ubyte", 8).long()
        chosen = torch.randperm(len(images), generator=generator)[:count]
        return images[chosen].float() / 127.5 - 1, targets[chosen]

    learned = some("train", learn)
    return Data(learned, (learned[0][:512], learned[1][:512]), some("t10k", judge))


TRAINED = {
    "digits": Task(
        "residual network, noisy digits", lambda: Stages(Before, 16, 1, bare=True), noisy_digits, epochs=3, tune=50
    ),
    "resnet": Task(
        "small ResNet, Fashion-MNIST", lambda: Stages(After, 16, 2, bare=False), fashion, epochs=5, tune=60
    ),
    "mobilenet": Task(
        "MobileNet-like network, Fashion-MNIST", lambda: Stages(Inverted, 16, 2, bare=False), fashion, epochs=5, tune=60
    ),
    "convnext": Task("ConvNeXt-like network, Fashion-MNIST", ConvNeXt, fashion, epochs=7, tune=60),
    "vit": Task(
        "small vision transformer, Fashion-MNIST", VisionTransformer, fashion, epochs=7, tune=60,
        protect=("stream", "*dims"),  # the dimensions of the heads
    ),
}  # fmt: skip
