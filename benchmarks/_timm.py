"""Small models of timm with random weights, one or two of every family, and images about as small as they allow."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import torch
from _proof import Case
from _torchvision import library

NAMES = (
    "beit_base_patch16_224", "botnet26t_256", "halonet26t", "lambda_resnet26t", "gernet_s", "mobileone_s0", "repvgg_a0",
    "bat_resnext26ts", "gcresnext26ts", "cait_xxs24_224", "coat_lite_tiny", "coat_mini", "convit_tiny",
    "convmixer_768_32", "convnext_atto", "convnextv2_atto", "cpubone_nano", "crossvit_tiny_240", "csatv2",
    "cs3darknet_s", "cspresnet50", "cspnext_tiny", "davit_tiny", "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224", "densenet121", "dla34", "dla60_res2net", "dpn48b", "dpn68", "edgenext_xx_small",
    "efficientformer_l1", "efficientformerv2_s0", "efficientnet_b0", "efficientnet_cc_b0_4e", "tf_efficientnet_b0",
    "mixnet_s", "mnasnet_050", "mobilenetv2_050", "tinynet_e", "efficientvim_m1", "efficientvit_b0", "efficientvit_m0",
    "eva02_tiny_patch14_224", "fasternet_t0", "fastvit_t8", "focalnet_tiny_srf", "gcvit_xxtiny", "ghostnet_050",
    "ghostnetv3_050", "hardcorenas_a", "hgnet_tiny", "hgnetv2_b0", "hiera_tiny_224", "sam2_hiera_tiny",
    "hrnet_w18_small", "iformer_t", "inception_next_atto", "inception_resnet_v2", "inception_v3", "inception_v4",
    "lcnetv2_small", "levit_128s", "levit_conv_128s", "lowformer_b0", "mambaout_femto", "coatnet_nano_rw_224",
    "maxvit_pico_rw_256", "poolformer_s12", "caformer_s18", "convformer_s18", "gmlp_ti16_224", "mixer_s32_224",
    "resmlp_12_224", "lcnet_050", "mobilenetv3_small_050", "mobilenetv4_conv_small_035", "mobilevit_xxs",
    "mobilevitv2_050", "mvitv2_tiny", "nest_tiny", "nextvit_small", "nf_resnet26", "dm_nfnet_f0", "pit_ti_224",
    "pvt_v2_b0", "rdnet_tiny", "regnetx_002", "regnety_002", "repghostnet_050", "repvit_m0_9", "res2net50_26w_4s",
    "resnest14d", "resnet18", "ecaresnet26t", "seresnet18", "resnetv2_18", "rexnet_100", "selecsls42",
    "legacy_seresnet18", "sequencer2d_s", "shvit_s1", "skresnet18", "starnet_s050", "swiftformer_xs",
    "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "tiny_vit_5m_224", "tnt_s_patch16_224",
    "twins_svt_small", "visformer_tiny", "vit_tiny_patch16_224", "vit_relpos_small_patch16_224", "volo_d1_224",
    "ese_vovnet19b_slim", "xception41", "xcit_nano_12_p16_224",
)  # fmt: skip

BLOCKS = ("halonet26t", "bat_resnext26ts")
"""Those that part their smallest maps into blocks of a fixed size."""


def timm_models() -> dict[str, Callable[[], Case]]:
    """By name, what makes a model and three images; those that can are made for images of any size."""
    library()  # timm imports torchvision
    import timm

    def make(name: str) -> Case:
        builder = timm.model_entrypoint(name)
        try:
            model = timm.create_model(name, dynamic_img_size=True)
        except TypeError:
            model = builder()
        whole = model.pretrained_cfg.get("fixed_input_size") or name in BLOCKS
        size = model.pretrained_cfg["input_size"][-1] if whole else 96
        (argument, *_) = inspect.signature(model.forward).parameters
        generator = torch.Generator().manual_seed(1)
        return model, {argument: torch.randn(3, 3, size, size, generator=generator, dtype=torch.float64)}

    return {name: partial(make, name) for name in NAMES if timm.is_model(name)}
