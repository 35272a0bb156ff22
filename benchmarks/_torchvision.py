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

SIZES = {"inception_v3": 96, "maxvit_t": 224, "vit_h_14": 28, "vit": 64, "ssd300": 300}
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
    """All builders of detection models, as `Dense`, and backbones; those of ResNet have frozen batch norms."""
    models = library()
    from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone

    def make(name: str) -> Case:
        return pictured(Dense(models.get_model(name, weights=None, weights_backbone=None)), name)

    def backbone(name: str, build: Callable[..., nn.Module], **options: Any) -> Case:
        return pictured(build(backbone_name=name, weights=None, **options), name)

    return {
        "mobilenet_v3_large fpn": partial(
            backbone, "mobilenet_v3_large", mobilenet_backbone, fpn=True, norm_layer=nn.BatchNorm2d
        ),
        "resnet18 fpn": partial(backbone, "resnet18", resnet_fpn_backbone),
        "resnet50 fpn": partial(backbone, "resnet50", resnet_fpn_backbone),
        **{name: partial(make, name) for name in ordered(models, models.detection)},
    }


def video() -> dict[str, Callable[[], Case]]:
    """All builders of models of video, with eight frames."""
    models = library()

    def make(name: str) -> Case:
        size = 224 if name.startswith(("mvit", "s3d")) else 64
        frames = 16 if name.startswith(("mvit", "s3d")) else 8
        generator = torch.Generator().manual_seed(1)
        return models.get_model(name, weights=None), {
            "x": torch.randn(3, 3, frames, size, size, generator=generator, dtype=torch.float64)
        }

    return {name: partial(make, name) for name in ordered(models, models.video)}


def small() -> dict[str, Callable[[], Case]]:
    """The architectures in a few narrow layers, for the tests."""
    models = library()
    from torchvision.models import convnext, densenet, efficientnet, mobilenetv3, regnet, resnet, swin_transformer, vgg
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.segmentation import deeplabv3, fcn
    from torchvision.ops import FrozenBatchNorm2d

    def flattened() -> nn.Module:
        features = vgg.make_layers([8, "M", 12, "M", 512], batch_norm=True)
        with torch.device("meta"):  # a classifier of 120 million weights
            module = models.VGG(features, init_weights=False)
        module.classifier = nn.Sequential(nn.Linear(512 * 49, 8), nn.ReLU(True), nn.Dropout(), nn.Linear(8, 5))
        return module

    def segmenting() -> nn.Module:
        body = IntermediateLayerGetter(resnet.ResNet(resnet.BasicBlock, [1] * 4), {"layer2": "aux", "layer3": "out"})
        return deeplabv3.DeepLabV3(body, deeplabv3.DeepLabHead(256, 4, (2, 3)), fcn.FCNHead(128, 4))

    def pyramid() -> nn.Module:
        body = resnet.ResNet(resnet.BasicBlock, [1] * 4, norm_layer=FrozenBatchNorm2d)
        return BackboneWithFPN(body, {f"layer{k}": f"{k}" for k in (2, 3, 4)}, [128, 256, 512], 16)

    inverted = partial(mobilenetv3.InvertedResidualConfig, dilation=1, width_mult=1.0)
    moved = [inverted(8, 3, 8, 8, True, "RE", 2), inverted(8, 5, 24, 12, False, "HS", 1)]
    moved += [inverted(12, 5, 24, 12, True, "HS", 1)]
    scaled = [efficientnet.FusedMBConvConfig(2, 3, 1, 8, 8, 2), efficientnet.MBConvConfig(3, 3, 2, 8, 12, 2)]
    stages = regnet.BlockParams([1, 2], [16, 24], [8, 8], [1.0, 1.0], [2, 2], 0.25)
    next_stages = [convnext.CNBlockConfig(8, 12, 1), convnext.CNBlockConfig(12, None, 1)]
    window = {"patch_size": [4, 4], "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}
    second = {"block": swin_transformer.SwinTransformerBlockV2, "downsample_layer": swin_transformer.PatchMergingV2}
    vit = {"image_size": 64, "patch_size": 32, "num_layers": 2, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 12}
    maxvit = {"input_size": (64, 64), "stem_channels": 8, "partition_size": 4, "block_channels": [8, 16]}
    maxvit |= {"block_layers": [1, 1], "head_dim": 4, "stochastic_depth_prob": 0.1}
    makers: dict[str, Callable[[], nn.Module]] = {
        "resnet": partial(resnet.ResNet, resnet.BasicBlock, [1] * 4),
        "vgg": flattened,
        "squeezenet": models.squeezenet1_1,
        "googlenet": partial(models.googlenet, weights=None, aux_logits=False, init_weights=False),
        "densenet": partial(densenet.DenseNet, 4, (2, 2), 8, 2),
        "mobilenet_v3": partial(mobilenetv3.MobileNetV3, moved, 32),
        "efficientnet": partial(efficientnet.EfficientNet, scaled, 0.2, last_channel=32),
        "regnet": partial(regnet.RegNet, stages, stem_width=8),
        "shufflenet": partial(models.ShuffleNetV2, [2, 3, 2], [8, 16, 32, 64, 32]),
        "convnext": partial(convnext.ConvNeXt, next_stages),
        "vit": partial(models.VisionTransformer, **vit),
        "swin": partial(models.SwinTransformer, **window),
        "swin_v2": partial(models.SwinTransformer, **window, **second),
        "maxvit": partial(models.MaxVit, **maxvit),
        "deeplab": segmenting,
        "resnet fpn": pyramid,
    }

    def make(name: str) -> Case:
        return pictured(makers[name](), name)

    return {name: partial(make, name) for name in makers}


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
