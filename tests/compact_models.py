"""Models of timm and torchvision, made small: their blocks as they are, few and narrow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def _timm(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, num_classes=5, **settings)
        return model

    return make


def _torchvision(build: Callable[[Any], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchvision.models

        return build(torchvision.models)

    return make


def _mixer() -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    model: nn.Module = MlpMixer(5, 64, patch_size=16, num_blocks=2, embed_dim=24)
    return model


_RESNET: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32), "stem_width": 8}
_VIT: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 3}

#: A name -> how it is made and the pixels of its input.
TIMM: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (_timm("resnet18", **_RESNET), 32),
    "resnet50": (_timm("resnet50", **_RESNET), 32),
    "resnet50d": (_timm("resnet50d", **_RESNET), 32),
    "seresnet18": (_timm("seresnet18", **_RESNET), 32),
    "resnext50": (_timm("resnext50_32x4d", layers=(1, 1, 1, 1), cardinality=4), 32),
    "resnetv2": (_timm("resnetv2_50", layers=(1, 1, 1, 1), channels=(16, 32, 48, 64)), 32),
    "group_norm": (
        _timm("resnet50_gn", layers=(1, 1, 1, 1), channels=(64, 64, 96, 64), stem_width=64),
        32,
    ),
    "densenet": (_timm("densenet121", growth_rate=8, block_config=(2, 2, 2)), 32),
    "mobilenetv2": (_timm("mobilenetv2_035"), 32),
    "mobilenetv3": (_timm("mobilenetv3_small_050"), 32),
    "efficientnet": (_timm("test_efficientnet"), 32),
    "mnasnet": (_timm("mnasnet_small"), 32),
    "lcnet": (_timm("lcnet_035"), 32),
    "tinynet": (_timm("tinynet_e"), 32),
    "ghostnet": (_timm("ghostnet_050", drop_rate=0.0), 32),
    "regnetx": (_timm("regnetx_002"), 32),
    "regnety": (_timm("regnety_002"), 32),
    "vit": (_timm("vit_tiny_patch16_224", img_size=32, **_VIT), 32),
    "convnext": (_timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)), 32),
    "mixer": (_mixer, 64),
}

TORCHVISION: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet": (
        _torchvision(lambda m: m.ResNet(m.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)),
        32,
    ),
    "bottleneck": (
        _torchvision(
            lambda m: m.ResNet(
                m.resnet.Bottleneck, [1, 1, 1, 1], num_classes=5, groups=4, width_per_group=8
            )
        ),
        32,
    ),
    "densenet": (
        _torchvision(lambda m: m.DenseNet(8, (2, 2, 2), num_init_features=16, num_classes=5)),
        32,
    ),
    "mobilenetv2": (_torchvision(lambda m: m.mobilenet_v2(width_mult=0.25, num_classes=5)), 32),
    "mobilenetv3": (_torchvision(lambda m: m.mobilenet_v3_small(width_mult=0.5)), 32),
    "mnasnet": (_torchvision(lambda m: m.MNASNet(0.25, num_classes=5)), 32),
    "shufflenet": (
        _torchvision(
            lambda m: m.ShuffleNetV2([1, 1, 1], [8, 16, 32, 64, 96], num_classes=5),
        ),
        32,
    ),
    "squeezenet": (_torchvision(lambda m: m.SqueezeNet("1_1", num_classes=5)), 48),
    "vgg": (
        _torchvision(
            lambda m: nn.Sequential(
                m.vgg.make_layers([8, "M", 16, "M", 24, 24], batch_norm=True),
                *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 32), nn.ReLU()),
                *(nn.Dropout(), nn.Linear(32, 5)),
            )
        ),
        32,
    ),
    "vit": (
        _torchvision(
            lambda m: m.VisionTransformer(32, 8, 2, 2, 16, 96, num_classes=5),
        ),
        32,
    ),
}


#: All of them, by their libraries.
LIBRARIES = {
    **{f"timm-{name}": found for name, found in TIMM.items()},
    **{f"torchvision-{name}": found for name, found in TORCHVISION.items()},
}
