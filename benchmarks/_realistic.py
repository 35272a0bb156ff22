"""Networks as people build them, narrow but whole, each with inputs of three sizes.

What they have in common is that their computation depends on the sizes of their inputs: anchors are made from the
heights and widths of maps, maps are resized to others, signals are padded and cropped, masks follow from lengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from _realistic_sequences import CausalModel, Conformer, EncoderDecoder
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

Inputs = dict[str, Tensor]
"""The arguments of a module by name."""


class Case(NamedTuple):
    """How to make a module, and its inputs of the sizes 0, 1 and 2."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]


# Images.


def unit(i: int, o: int, k: int = 1, stride: int = 1) -> nn.Sequential:
    """A convolution, batch norm and SiLU."""
    return nn.Sequential(nn.Conv2d(i, o, k, stride, k // 2, bias=False), nn.BatchNorm2d(o), nn.SiLU())


class Bottleneck(nn.Module):
    """Two convolutions with a shortcut."""

    def __init__(self, channels: int, shortcut: bool) -> None:
        super().__init__()
        self.cv1, self.cv2, self.shortcut = unit(channels, channels, 3), unit(channels, channels, 3), shortcut

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.cv2(self.cv1(x))
        return x + y if self.shortcut else y


class C2f(nn.Module):
    """YOLOv8's block: the maps are halved, bottlenecks continue the second half, all of them are concatenated."""

    def __init__(self, i: int, o: int, count: int = 1, shortcut: bool = True) -> None:
        super().__init__()
        self.cv1, self.cv2 = unit(i, o), unit((2 + count) * (o // 2), o)
        self.m = nn.ModuleList(Bottleneck(o // 2, shortcut) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        maps = list(self.cv1(x).chunk(2, 1))
        maps.extend(block(maps[-1]) for block in self.m)
        y: Tensor = self.cv2(torch.cat(maps, 1))
        return y


class SPPF(nn.Module):
    """Spatial pyramid pooling: one pooling three times, one after the other."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.cv1, self.cv2, self.m = unit(i, i // 2), unit(2 * i, o), nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.cv1(x)]
        maps.extend(self.m(maps[-1]) for _ in range(3))
        y: Tensor = self.cv2(torch.cat(maps, 1))
        return y


class DFL(nn.Module):
    """Distances as the means of distributions over bins (Li et al. 2020, arXiv 2006.04388)."""

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.bins, self.conv = bins, nn.Conv2d(bins, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data = torch.arange(float(bins)).reshape(1, bins, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, anchors = x.shape
        y: Tensor = self.conv(x.view(n, 4, self.bins, anchors).transpose(2, 1).softmax(1))
        return y.view(n, 4, anchors)


class Detect(nn.Module):
    """Boxes and classes at every place of three maps, ``(N, 4 + classes, places)``; anchors are made in forward."""

    def __init__(self, channels: tuple[int, ...], classes: int, bins: int = 4) -> None:
        super().__init__()
        self.classes, self.bins, self.strides = classes, bins, (8, 16, 32)
        wide = 4 * bins
        self.cv2 = nn.ModuleList(nn.Sequential(unit(c, wide, 3), nn.Conv2d(wide, 4 * bins, 1)) for c in channels)
        self.cv3 = nn.ModuleList(nn.Sequential(unit(c, 12, 3), nn.Conv2d(12, classes, 1)) for c in channels)
        self.dfl = DFL(bins)

    def anchors(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The centers of all places, ``(2, places)``, and the strides of their maps, ``(1, places)``."""
        points, strides = [], []
        for x, stride in zip(maps, self.strides, strict=True):
            h, w = x.shape[2:]
            across = torch.arange(w, dtype=x.dtype, device=x.device) + 0.5
            down = torch.arange(h, dtype=x.dtype, device=x.device) + 0.5
            y, x_ = torch.meshgrid(down, across, indexing="ij")
            points.append(torch.stack((x_, y), -1).view(-1, 2))
            strides.append(torch.full((h * w, 1), stride, dtype=x.dtype, device=x.device))
        return torch.cat(points).transpose(0, 1), torch.cat(strides).transpose(0, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        maps = [torch.cat((a(x), b(x)), 1) for x, a, b in zip(features, self.cv2, self.cv3, strict=True)]
        width = self.classes + 4 * self.bins
        flat = torch.cat([x.view(x.shape[0], width, -1) for x in maps], 2)
        box, scores = flat.split((4 * self.bins, self.classes), 1)
        anchors, strides = self.anchors(maps)
        before, after = self.dfl(box).chunk(2, 1)
        first, last = anchors.unsqueeze(0) - before, anchors.unsqueeze(0) + after
        boxes = torch.cat(((first + last) / 2, last - first), 1) * strides
        return torch.cat((boxes, scores.sigmoid()), 1)


class Detector(nn.Module):
    """A YOLOv8 of few channels: backbone, a neck that goes up and down again, and a decoupled head."""

    def __init__(self, classes: int = 3, c: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(unit(3, c, 3, 2), unit(c, c, 3, 2), C2f(c, c))
        self.p3 = nn.Sequential(unit(c, 2 * c, 3, 2), C2f(2 * c, 2 * c))
        self.p4 = nn.Sequential(unit(2 * c, 3 * c, 3, 2), C2f(3 * c, 4 * c))
        self.p5 = nn.Sequential(unit(4 * c, 4 * c, 3, 2), C2f(4 * c, 4 * c), SPPF(4 * c, 4 * c))
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.up4, self.up3 = C2f(8 * c, 4 * c, shortcut=False), C2f(6 * c, 2 * c, shortcut=False)
        self.down3, self.down4 = unit(2 * c, 2 * c, 3, 2), unit(4 * c, 4 * c, 3, 2)
        self.out4, self.out5 = C2f(6 * c, 4 * c, shortcut=False), C2f(8 * c, 4 * c, shortcut=False)
        self.head = Detect((2 * c, 4 * c, 4 * c), classes)

    def forward(self, image: Tensor) -> Tensor:
        p3 = self.p3(self.stem(image))
        p4 = self.p4(p3)
        p5 = self.p5(p4)
        n4 = self.up4(torch.cat((self.up(p5), p4), 1))
        n3 = self.up3(torch.cat((self.up(n4), p3), 1))
        n4 = self.out4(torch.cat((self.down3(n3), n4), 1))
        n5 = self.out5(torch.cat((self.down4(n4), p5), 1))
        y: Tensor = self.head([n3, n4, n5])
        return y


def double(i: int, o: int) -> nn.Sequential:
    """Two convolutions with batch norm and ReLU."""
    layers: list[nn.Module] = []
    for before in (i, o):
        layers += [nn.Conv2d(before, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """A U-Net of three levels for images of any size.

    What goes up is resized to its skip connection, or images are padded to multiples of eight and outputs cropped.
    """

    def __init__(self, pads: bool, classes: int = 2, widths: tuple[int, ...] = (6, 8, 12, 16)) -> None:
        super().__init__()
        self.pads, self.pool = pads, nn.MaxPool2d(2)
        before = (3, *widths[:-1])
        self.down = nn.ModuleList(double(i, o) for i, o in zip(before, widths, strict=True))
        turned = [(deep, skip) for skip, deep in pairwise(widths)][::-1]
        if pads:
            self.up = nn.ModuleList(nn.ConvTranspose2d(deep, skip, 2, 2) for deep, skip in turned)
            self.mix = nn.ModuleList(double(2 * skip, skip) for _, skip in turned)
        else:
            self.mix = nn.ModuleList(double(deep + skip, skip) for deep, skip in turned)
        self.out = nn.Conv2d(widths[0], classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        h, w = image.shape[-2:]
        x = F.pad(image, (0, -w % 8, 0, -h % 8), mode="reflect") if self.pads else image
        skips: list[Tensor] = []
        for k, block in enumerate(self.down):
            x = block(self.pool(x) if k else x)
            skips.append(x)
        for k, mix in enumerate(self.mix):
            skip = skips[-2 - k]
            if self.pads:
                x = self.up[k](x)
            else:
                x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
            x = mix(torch.cat((skip, x), 1))
        y: Tensor = self.out(x)
        return y[..., :h, :w] if self.pads else y


# Sound.


class Demucs(nn.Module):
    """A Demucs of two levels: strided convolutions with gated linear units, and back; signals are padded to fit."""

    def __init__(self, sources: int = 2, channels: int = 8, depth: int = 2, kernel: int = 8, stride: int = 4) -> None:
        super().__init__()
        self.sources, self.depth, self.kernel, self.stride = sources, depth, kernel, stride
        self.encoder, self.decoder, self.inner = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        before, after = 2, channels
        for level in range(depth):
            self.encoder.append(
                nn.Sequential(
                    nn.Conv1d(before, after, kernel, stride), nn.ReLU(), nn.Conv1d(after, 2 * after, 1), nn.GLU(1)
                )
            )
            back = sources * 2 if level == 0 else before
            last: list[nn.Module] = [nn.ReLU()] if level else []
            self.decoder.insert(
                0,
                nn.Sequential(
                    nn.Conv1d(after, 2 * after, 3, padding=1), nn.GLU(1),
                    nn.ConvTranspose1d(after, back, kernel, stride), *last,
                ),
            )  # fmt: skip
            before, after = after, 2 * after
        for dilation in (1, 2):  # what stands in for a recurrent layer, as in the hybrid version
            few = before // 2
            self.inner.append(
                nn.Sequential(
                    nn.Conv1d(before, few, 3, dilation=dilation, padding=dilation), nn.GroupNorm(1, few), nn.GELU(),
                    nn.Conv1d(few, 2 * before, 1), nn.GroupNorm(1, 2 * before), nn.GLU(1),
                )
            )  # fmt: skip

    def valid_length(self, length: int) -> int:
        """The least length from this one on that the strided convolutions take without a rest."""
        for _ in range(self.depth):
            length = math.ceil((length - self.kernel) / self.stride) + 1
            length = max(length, 1)
        for _ in range(self.depth):
            length = (length - 1) * self.stride + self.kernel
        return length

    def forward(self, mix: Tensor) -> Tensor:
        length = mix.shape[-1]
        mono = mix.mean(1, keepdim=True)
        mean, deviation = mono.mean(-1, keepdim=True), mono.std(-1, keepdim=True)
        delta = self.valid_length(length) - length
        x = F.pad((mix - mean) / (1e-5 + deviation), (delta // 2, delta - delta // 2))
        skips = []
        for encode in self.encoder:
            x = encode(x)
            skips.append(x)
        for block in self.inner:
            x = x + block(x)
        for decode in self.decoder:
            x = decode(x + skips.pop())
        x = x[..., delta // 2 : delta // 2 + length] * deviation + mean
        return x.view(x.shape[0], self.sources, 2, x.shape[-1])


class Generator(nn.Module):
    """HiFi-GAN: transposed convolutions, each followed by residual blocks of several kernels, all weight-normed."""

    def __init__(self, mels: int = 10, channels: int = 16, rates: tuple[int, ...] = (4, 2)) -> None:
        super().__init__()
        self.pre = weight_norm(nn.Conv1d(mels, channels, 7, padding=3))
        self.ups, self.blocks = nn.ModuleList(), nn.ModuleList()
        for rate in rates:
            self.ups.append(weight_norm(nn.ConvTranspose1d(channels, channels // 2, 2 * rate, rate, rate // 2)))
            channels //= 2
            self.blocks.append(nn.ModuleList(ResidualBlock(channels, kernel) for kernel in (3, 5)))
        self.post = weight_norm(nn.Conv1d(channels, 1, 7, padding=3))

    def forward(self, mel: Tensor) -> Tensor:
        x = self.pre(mel)
        for up, blocks in zip(self.ups, self.blocks, strict=True):
            x = up(F.leaky_relu(x, 0.1))
            assert isinstance(blocks, nn.ModuleList)
            total = torch.stack([block(x) for block in blocks])
            x = total.sum(0) / len(blocks)
        return torch.tanh(self.post(F.leaky_relu(x)))


class ResidualBlock(nn.Module):
    """Dilated and plain convolutions in turns, with a shortcut around each pair."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()

        def conv(dilation: int) -> nn.Module:
            padding = dilation * (kernel - 1) // 2
            normed: nn.Module = weight_norm(nn.Conv1d(channels, channels, kernel, padding=padding, dilation=dilation))
            return normed

        self.dilated = nn.ModuleList(conv(dilation) for dilation in (1, 3))
        self.plain = nn.ModuleList(conv(1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for first, second in zip(self.dilated, self.plain, strict=True):
            x = x + second(F.leaky_relu(first(F.leaky_relu(x, 0.1)), 0.1))
        return x


# The table.


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def tokens(*shape: int) -> Tensor:
    return torch.randint(1, 40, shape, generator=torch.Generator().manual_seed(sum(shape)))


def left_padded(k: int) -> Inputs:
    """Texts of several lengths, the shorter ones padded on the left."""
    n, t = ((3, 10), (2, 5), (4, 23))[k]
    padding = torch.arange(n)[:, None] * 2 % t
    return {"ids": tokens(n, t), "mask": (torch.arange(t) >= padding).long()}


def spoken(k: int) -> Inputs:
    """Spectrograms of several lengths, the longest first."""
    n, t = ((3, 40), (2, 27), (4, 66))[k]
    return {"frames": noise(n, t, 12), "lengths": t - 5 * torch.arange(n)}


def recorded(k: int) -> Inputs:
    """A spectrogram and the text so far."""
    n, frames, words = ((2, 24, 9), (3, 17, 4), (2, 40, 15))[k]
    return {"mel": noise(n, 10, frames), "ids": tokens(n, words)}


REALISTIC = {
    "detector": Case(Detector, lambda k: {"image": noise(*((2, 3, 64, 64), (3, 3, 96, 64), (2, 3, 64, 160))[k])}),
    "U-Net that resizes": Case(
        lambda: UNet(pads=False), lambda k: {"image": noise(*((2, 3, 32, 32), (3, 3, 45, 38), (2, 3, 50, 71))[k])}
    ),
    "U-Net that pads": Case(
        lambda: UNet(pads=True), lambda k: {"image": noise(*((2, 3, 30, 27), (3, 3, 45, 38), (2, 3, 64, 48))[k])}
    ),
    "Demucs": Case(Demucs, lambda k: {"mix": noise(*((2, 2, 300), (3, 2, 211), (2, 2, 512))[k])}),
    "Conformer": Case(Conformer, spoken),
    "HiFi-GAN": Case(Generator, lambda k: {"mel": noise(*((2, 10, 12), (3, 10, 7), (2, 10, 31))[k])}),
    "Whisper": Case(EncoderDecoder, recorded),
    "causal language model": Case(CausalModel, left_padded),
}  # fmt: skip
"""By name."""
