"""The models of torchvision with random weights, and images that are about as small as they allow."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _proof import Case
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

QUICK = (
    "alexnet", "resnet18", "vgg11_bn", "squeezenet1_0", "mobilenet_v3_small", "shufflenet_v2_x0_5", "mnasnet0_5",
    "efficientnet_b0", "regnet_y_400mf", "densenet121", "convnext_tiny", "swin_t",
)  # fmt: skip

SIZES = {"inception_v3": 96, "maxvit": 224, "vit_h_14": 28, "vit": 64, "ssd300": 300}
"""The height and width of the images where it is not 64."""

FRAGMENTS: list[torch.library.Library] = []


def library() -> Any:
    """``torchvision.models``, also where torchvision's compiled operators are missing: their schemas are enough."""
    fragment = torch.library.Library("torchvision", "FRAGMENT")
    FRAGMENTS.append(fragment)  # a definition lasts as long as its library
    for name in ("nms", "qnms"):
        try:
            fragment.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:
            break  # the operators are there
    import torchvision.models as models

    return models


class Dense(nn.Module):
    """All that a detection model computes with weights: it neither chooses boxes nor drops any.

    The heads that look at regions are given one, the whole image.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.head = model.rpn.head if hasattr(model, "rpn") else model.head
        self.regions = nn.ModuleDict()
        self.sizes: dict[str, int] = {}
        for kind in ("box", "mask", "keypoint"):
            if getattr(getattr(model, "roi_heads", None), f"{kind}_head", None) is not None:
                parts = [getattr(model.roi_heads, f"{kind}_{part}") for part in ("head", "predictor")]
                self.regions[kind] = nn.Sequential(*parts)
                self.sizes[kind] = model.roi_heads.get_submodule(f"{kind}_roi_pool").output_size[0]

    def forward(self, x: Tensor) -> Any:
        features = list(self.backbone(x).values())
        regions = {
            name: head(adaptive_avg_pool2d(features[0], self.sizes[name])) for name, head in self.regions.items()
        }
        return self.head(features), regions


def classification() -> dict[str, Callable[[], Case]]:
    """All builders of classification models, by name, from few parameters to many."""
    models = library()

    def make(name: str) -> Case:
        extra: dict[str, Any] = (
            {"image_size": next(n for start, n in SIZES.items() if name.startswith(start))}
            if name.startswith("vit")
            else {}
        )
        extra |= {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
        return pictured(models.get_model(name, weights=None, **extra), name)

    return {name: partial(make, name) for name in ordered(models, models)}


def segmentation() -> dict[str, Callable[[], Case]]:
    """All builders of segmentation models, with their auxiliary heads."""
    models = library()

    def make(name: str) -> Case:
        extra = {} if name.startswith("lraspp") else {"aux_loss": True}
        return pictured(models.get_model(name, weights=None, weights_backbone=None, **extra), name)

    return {name: partial(make, name) for name in ordered(models, models.segmentation)}


def detection() -> dict[str, Callable[[], Case]]:
    """All builders of detection models, as `Dense`, and backbones with frozen batch norms."""
    models = library()
    from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone

    def make(name: str) -> Case:
        return pictured(Dense(models.get_model(name, weights=None, weights_backbone=None)), name)

    def backbone(name: str, build: Callable[..., nn.Module], **options: Any) -> Case:
        return pictured(build(backbone_name=name, weights=None, **options), name)

    return {
        "mobilenet_v3_large fpn": partial(backbone, "mobilenet_v3_large", mobilenet_backbone, fpn=True),
        "resnet18 fpn": partial(backbone, "resnet18", resnet_fpn_backbone),
        "resnet50 fpn": partial(backbone, "resnet50", resnet_fpn_backbone),
        **{name: partial(make, name) for name in ordered(models, models.detection)},
    }


def ordered(models: Any, module: Any) -> list[str]:
    """The names of all builders in a module of torchvision, small models first."""
    names: list[str] = models.list_models(module=module)
    return sorted(names, key=lambda name: models.get_model_weights(name).DEFAULT.meta["num_params"])


def pictured(module: nn.Module, name: str) -> Case:
    """A model with three images."""
    size = next((n for start, n in SIZES.items() if name.startswith(start)), 64)
    (argument,) = inspect.signature(module.forward).parameters
    generator = torch.Generator().manual_seed(1)
    return module, {argument: torch.randn(3, 3, size, size, generator=generator, dtype=torch.float64)}
