"""Small models of timm, torchvision and transformers, and what fusereg makes of each.

``tests/test_zoo.py`` asks of every model that neither conversion nor folding changes a result;
``docs/scripts/zoo.py`` writes the page that says what was fused, folded and left, and why.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LIBRARIES = ("timm", "torchvision", "transformers")
_BatchNorm = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Entry:
    """A model, and the tensors that it is called with, by the names of its arguments."""

    library: str
    name: str
    create: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]

    @property
    def id(self) -> str:
        return f"{self.library}-{self.name}"

    def call(self, model: nn.Module, inputs: dict[str, Tensor]) -> Any:
        """Call the model as its users do: with images by position, with tokens by keyword."""
        return model(**inputs) if self.library == "transformers" else model(*inputs.values())

    def build(self) -> nn.Module:
        """Return the model in float64, with random parameters and statistics that fit its input.

        Its dropouts have p = 0: those of fusereg drop other elements than torch's.
        """
        torch.manual_seed(7)
        model = self.create().double()
        for layer in model.modules():
            for probability in ("p", "drop_prob"):
                if isinstance(getattr(layer, probability, None), float):
                    setattr(layer, probability, 0.0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1 and not parameter.any():  # some heads begin with zeros
                    parameter.normal_(0.0, 0.1)
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        if not norms:
            return model
        momenta = [m.momentum for m in norms]
        with torch.no_grad():
            for norm in norms:
                if norm.affine:
                    norm.weight.uniform_(0.6, 1.4)
                    norm.bias.normal_(0.0, 0.2)
                norm.momentum = 1.0
            self.call(model.train(), self.inputs())
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
                if norm.running_var is not None:
                    deviation = norm.running_var.sqrt()
                    norm.running_mean += 0.1 * torch.randn_like(deviation) * deviation
                    norm.running_var *= torch.empty_like(deviation).uniform_(0.8, 1.25)
        return model


# --- the list -------------------------------------------------------------------------------------


def _of(module: str) -> Any:
    """Return a module of one of the libraries, once torchvision can be imported."""
    importlib.import_module("other_libraries")
    return importlib.import_module(module)


def _images(size: int, batch: int = 3, channels: int = 3) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"x": torch.randn(batch, channels, size, size, dtype=torch.float64)}


def _timm() -> Iterator[Entry]:
    drops = {"drop_rate": 0.1}
    paths = {"drop_rate": 0.1, "drop_path_rate": 0.1}
    vit = {"img_size": 64, "depth": 2, **paths}
    narrow = {"embed_dim": 96, "num_heads": 4}
    swin = {"img_size": 64, "embed_dim": 24, "depths": (1, 1, 2, 1), "window_size": 4, **paths}
    #: Name: the size of the images, and options, some of which make the model smaller.
    table: dict[str, tuple[int, dict[str, Any]]] = {
        # Residual networks
        "resnet10t": (64, paths),
        "resnet18": (64, {**drops, "drop_block_rate": 0.1}),
        "resnet26d": (64, paths),
        "resnetblur18": (64, drops),
        "seresnet18": (64, drops),
        "ecaresnet26t": (64, drops),
        "seresnext26t_32x4d": (64, drops),
        "test_resnet": (64, paths),
        "legacy_seresnet18": (64, drops),
        "skresnet18": (64, drops),
        "resnest14d": (64, drops),
        "res2net50_14w_8s": (64, drops),
        "resnetv2_18": (64, drops),
        "nf_resnet26": (64, drops),
        "test_nfnet": (64, drops),
        "tresnet_m": (64, drops),
        "regnetx_002": (64, paths),
        "regnety_002": (64, paths),
        "selecsls42": (64, drops),
        "ese_vovnet19b_slim": (64, paths),
        "densenet121": (64, drops),
        "cs3darknet_s": (64, paths),
        "cspnext_tiny": (64, paths),
        "dla46_c": (64, drops),
        "dpn48b": (64, drops),
        "hrnet_w18_small": (64, drops),
        "hgnetv2_b0": (64, paths),
        "inception_v3": (96, drops),
        # For phones
        "mobilenetv2_035": (64, paths),
        "mobilenetv3_small_050": (64, paths),
        "mobilenetv4_conv_small_035": (64, paths),
        "mnasnet_050": (64, paths),
        "efficientnet_b0": (64, paths),
        "efficientnet_lite0": (64, paths),
        "test_efficientnet": (64, paths),
        "test_efficientnet_gn": (64, paths),
        "efficientnetv2_rw_t": (64, paths),
        "mixnet_s": (64, paths),
        "hardcorenas_a": (64, paths),
        "lcnet_035": (64, paths),
        "ghostnet_050": (64, drops),
        "repghostnet_050": (64, drops),
        "rexnet_100": (64, paths),
        "fasternet_t0": (64, paths),
        "starnet_s050": (64, paths),
        "tinynet_e": (64, paths),
        # Of described blocks
        "test_byobnet": (64, paths),
        "repvgg_a0": (64, paths),
        "mobileone_s0": (64, paths),
        "resnext26ts": (64, paths),
        "gernet_s": (64, paths),
        "botnet26t_256": (64, {"img_size": 64, **paths}),
        # Convolutions, and with attention
        "convnext_atto": (64, paths),
        "test_convnext": (64, paths),
        "inception_next_atto": (64, paths),
        "edgenext_xx_small": (64, paths),
        "efficientformer_l1": (224, {"depths": (1, 1, 1, 2), **paths}),
        "efficientformerv2_s0": (224, {"depths": (1, 1, 1, 2), **paths}),
        "efficientvit_b0": (64, drops),
        "efficientvit_m0": (224, drops),
        "fastvit_t8": (64, paths),
        "levit_128s": (224, {"depth": (1, 1, 1), **paths}),
        "levit_conv_128s": (224, {"depth": (1, 1, 1), **paths}),
        "mobilevit_xxs": (64, paths),
        "mobilevitv2_050": (64, paths),
        "repvit_m0_9": (64, drops),
        "shvit_s1": (128, drops),
        "swiftformer_xs": (64, paths),
        "pvt_v2_b0": (64, paths),
        "visformer_tiny": (224, {"depth": (1, 1, 1), **paths}),
        "coatnet_pico_rw_224": (64, {"img_size": 64, **paths}),
        "test_mambaout": (64, paths),
        "tiny_vit_5m_224": (64, {"depths": (1, 1, 1, 1), **paths}),
        # Transformers
        "vit_tiny_patch16_224": (64, {**vit, "attn_drop_rate": 0.1}),
        "deit_tiny_patch16_224": (64, vit),
        "vit_relpos_small_patch16_224": (64, {**vit, **narrow}),
        "eva02_tiny_patch14_224": (56, {**vit, "img_size": 56}),
        "beit_base_patch16_224": (64, {**vit, **narrow}),
        "swin_tiny_patch4_window7_224": (64, swin),
        "swinv2_tiny_window8_256": (64, swin),
        "xcit_nano_12_p16_224": (64, vit),
        "pit_ti_224": (64, {"img_size": 64, "depth": (1, 1, 1), **paths}),
    }
    for name, (size, options) in table.items():
        create = _created(name, {"num_classes": 4, "pretrained": False, **options})
        yield Entry("timm", name, create, _images(size))


def _created(name: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    return lambda: _of("timm").create_model(name, **options)  # type: ignore[no-any-return]


def _torchvision() -> Iterator[Entry]:
    def by_name(name: str, **options: Any) -> Callable[[], nn.Module]:
        return lambda: _of("torchvision.models").get_model(name, weights=None, **options)  # type: ignore[no-any-return]

    def by_class(path: str, **options: Any) -> Callable[[], nn.Module]:
        """A class of torchvision, for sizes that its functions do not have."""
        module, _, cls = f"torchvision.models.{path}".rpartition(".")
        return lambda: getattr(_of(module), cls)(
            **{k: v(_of(module)) if callable(v) else v for k, v in options.items()}
        )  # type: ignore[no-any-return]

    def vgg(batch_norm: bool) -> Callable[[], nn.Module]:
        def create() -> nn.Module:
            module = _of("torchvision.models.vgg")
            layers = module.make_layers([8, "M", 16, "M", 32, 32, "M"], batch_norm=batch_norm)
            model: nn.Module = module.VGG(layers, num_classes=4)
            assert isinstance(model.classifier, nn.Sequential)
            model.classifier[0] = nn.Linear(32 * 49, 64)
            model.classifier[3], model.classifier[6] = nn.Linear(64, 64), nn.Linear(64, 4)
            return model

        return create

    four = {"num_classes": 4}
    swin: dict[str, Any] = {
        "embed_dim": 16, "depths": [1, 1, 2], "num_heads": [1, 2, 4], "dropout": 0.1, **four
    }  # fmt: skip

    def video(stem: str, conv: str) -> Callable[[], nn.Module]:
        return by_class(
            "video.resnet.VideoResNet",
            block=lambda m: m.BasicBlock,
            conv_makers=lambda m: [getattr(m, conv)] * 4,
            layers=[1, 1, 1, 1],
            stem=lambda m: getattr(m, stem),
            **four,
        )

    def clip() -> dict[str, Tensor]:
        return {"x": torch.randn(2, 3, 8, 16, 16, dtype=torch.float64)}

    bottleneck: dict[str, Any] = {
        "block": lambda m: m.Bottleneck, "layers": [1, 2, 1, 1], **four
    }  # fmt: skip
    segment = {"weights_backbone": None, **four}
    table: dict[str, tuple[Callable[[], nn.Module], Any]] = {
        "resnet18": (by_name("resnet18", **four), _images(64)),
        "resnet (bottleneck)": (by_class("resnet.ResNet", **bottleneck), _images(64)),
        "resnext (bottleneck)": (
            by_class("resnet.ResNet", **bottleneck, groups=8, width_per_group=4),
            _images(64),
        ),
        "vgg": (vgg(False), _images(32)),
        "vgg_bn": (vgg(True), _images(32)),
        "squeezenet1_1": (by_name("squeezenet1_1", **four), _images(64)),
        "densenet": (
            by_class(
                "densenet.DenseNet", growth_rate=8, block_config=(2, 3, 2), drop_rate=0.1, **four
            ),
            _images(64),
        ),
        "googlenet": (
            by_name("googlenet", init_weights=False, aux_logits=False, **four),
            _images(64),
        ),
        "shufflenet_v2_x0_5": (by_name("shufflenet_v2_x0_5", **four), _images(64)),
        "mobilenet_v2": (by_name("mobilenet_v2", width_mult=0.5, **four), _images(64)),
        "mobilenet_v3_small": (by_name("mobilenet_v3_small", **four), _images(64)),
        "mnasnet0_5": (by_name("mnasnet0_5", **four), _images(64)),
        "efficientnet_b0": (by_name("efficientnet_b0", **four), _images(64)),
        "regnet_x_400mf": (by_name("regnet_x_400mf", **four), _images(64)),
        "regnet_y_400mf": (by_name("regnet_y_400mf", **four), _images(64)),
        "convnext": (
            by_class(
                "convnext.ConvNeXt",
                block_setting=lambda m: [m.CNBlockConfig(16, 32, 1), m.CNBlockConfig(32, None, 2)],
                stochastic_depth_prob=0.1,
                **four,
            ),
            _images(32),
        ),
        "swin": (
            by_class(
                "swin_transformer.SwinTransformer", patch_size=[4, 4], window_size=[4, 4], **swin
            ),
            _images(64),
        ),
        "swin_v2": (
            by_class(
                "swin_transformer.SwinTransformer",
                patch_size=[4, 4],
                window_size=[4, 4],
                block=lambda m: m.SwinTransformerBlockV2,
                downsample_layer=lambda m: m.PatchMergingV2,
                **swin,
            ),
            _images(64),
        ),
        "swin3d": (
            by_class(
                "video.swin_transformer.SwinTransformer3d",
                patch_size=[2, 4, 4],
                window_size=[2, 4, 4],
                **swin,
            ),
            clip,
        ),
        "vit": (
            by_class(
                "vision_transformer.VisionTransformer",
                image_size=32,
                patch_size=8,
                num_layers=2,
                num_heads=2,
                hidden_dim=16,
                mlp_dim=32,
                dropout=0.1,
                attention_dropout=0.1,
                **four,
            ),
            _images(32),
        ),
        "maxvit": (
            by_class(
                "maxvit.MaxVit",
                input_size=(64, 64),
                stem_channels=16,
                partition_size=2,
                block_channels=[16, 32],
                block_layers=[1, 1],
                head_dim=8,
                stochastic_depth_prob=0.1,
                **four,
            ),
            _images(64),
        ),
        "deeplabv3_mobilenet_v3_large": (
            by_name("deeplabv3_mobilenet_v3_large", **segment),
            _images(64),
        ),
        "lraspp_mobilenet_v3_large": (by_name("lraspp_mobilenet_v3_large", **segment), _images(64)),
        "r3d": (video("BasicStem", "Conv3DSimple"), clip),
        "r2plus1d": (video("R2Plus1dStem", "Conv2Plus1D"), clip),
        "mc3": (video("BasicStem", "Conv3DNoTemporal"), clip),
    }
    for name, (create, inputs) in table.items():
        yield Entry("torchvision", name, create, inputs)


def _transformers() -> Iterator[Entry]:
    text = {
        "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 48, "max_position_embeddings": 40,
    }  # fmt: skip
    image = {"image_size": 32, "patch_size": 8, "num_labels": 4}
    vit = {k: text[k] for k in list(text)[1:-1]}
    seq2seq = {
        "vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48, "max_position_embeddings": 40,
    }  # fmt: skip
    no_mask = {"apply_spec_augment": False, "layerdrop": 0.0}

    def tokens() -> dict[str, Tensor]:
        return {"input_ids": torch.randint(5, 90, (3, 11))}

    def both() -> dict[str, Tensor]:
        return {"input_ids": torch.randint(5, 90, (3, 11)),
                "decoder_input_ids": torch.randint(5, 90, (3, 7))}  # fmt: skip

    def pixels(size: int) -> Callable[[], dict[str, Tensor]]:
        return lambda: {"pixel_values": torch.randn(3, 3, size, size, dtype=torch.float64)}

    def sound() -> dict[str, Tensor]:
        return {"input_values": torch.randn(2, 1200, dtype=torch.float64)}

    table: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Tensor]]]] = {
        "BertForSequenceClassification": (text, tokens),
        "RobertaForMaskedLM": (text, tokens),
        "ElectraForPreTraining": ({**text, "embedding_size": 16}, tokens),
        "AlbertModel": ({**text, "embedding_size": 16}, tokens),
        "DebertaV2ForSequenceClassification": (
            {**text, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
            tokens,
        ),
        "DistilBertForSequenceClassification": (
            {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48},
            tokens,
        ),
        "GPT2LMHeadModel": (
            {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 40},
            tokens,
        ),
        "OPTForCausalLM": (
            {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 48,
             "num_attention_heads": 2, "max_position_embeddings": 40, "word_embed_proj_dim": 32},
            tokens,
        ),
        "LlamaForCausalLM": ({**text, "num_key_value_heads": 1}, tokens),
        "GPTNeoXForCausalLM": ({**text, "hidden_dropout": 0.1, "attention_dropout": 0.1}, tokens),
        "T5ForConditionalGeneration": (
            {"vocab_size": 99, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2,
             "num_heads": 2},
            both,
        ),
        "BartForConditionalGeneration": (seq2seq, both),
        "ViTForImageClassification": ({**vit, **image}, pixels(32)),
        "DeiTForImageClassification": ({**vit, **image}, pixels(32)),
        "BeitForImageClassification": ({**vit, **image, "drop_path_rate": 0.1}, pixels(32)),
        "Dinov2ForImageClassification": ({**vit, **image, "drop_path_rate": 0.1}, pixels(32)),
        "SwinForImageClassification": (
            {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1],
             "num_heads": [2, 2], "window_size": 4, "num_labels": 4},
            pixels(32),
        ),
        "ConvNextForImageClassification": (
            {"hidden_sizes": [16, 32, 32, 48], "depths": [1, 1, 2, 1], "drop_path_rate": 0.1},
            pixels(32),
        ),
        "ResNetForImageClassification": (
            {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2]},
            pixels(32),
        ),
        "RegNetForImageClassification": (
            {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2], "groups_width": 8},
            pixels(32),
        ),
        "MobileNetV2ForImageClassification": ({"depth_multiplier": 0.35}, pixels(64)),
        "MobileViTForImageClassification": (
            {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32],
             "image_size": 64, "num_attention_heads": 2, "mlp_ratio": 2.0},
            pixels(64),
        ),
        "LevitForImageClassification": (
            {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [1, 2, 2],
             "depths": [1, 1, 1], "key_dim": [8, 8, 8]},
            pixels(64),
        ),
        "SegformerForSemanticSegmentation": (
            {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 24],
             "num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 16},
            pixels(64),
        ),
        "Wav2Vec2ForCTC": (
            {**vit, "vocab_size": 20, "conv_dim": (16, 16), "conv_stride": (5, 4),
             "conv_kernel": (10, 8), "num_conv_pos_embedding_groups": 2,
             "num_conv_pos_embeddings": 4, **no_mask},
            sound,
        ),
        "Wav2Vec2ConformerForCTC": (
            {**vit, "vocab_size": 20, "conv_dim": (16, 16), "conv_stride": (5, 4),
             "conv_kernel": (10, 8), "num_conv_pos_embedding_groups": 2,
             "num_conv_pos_embeddings": 4, "position_embeddings_type": "relative", **no_mask},
            sound,
        ),
    }  # fmt: skip
    for name, (options, inputs) in table.items():
        yield Entry("transformers", name, _configured(name, options), inputs)


def _configured(name: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    def create() -> nn.Module:
        cls = getattr(_of("transformers"), name)
        model: nn.Module = cls(cls.config_class(**options))
        return model

    return create


ENTRIES = (*_timm(), *_torchvision(), *_transformers())


# --- what becomes of them -------------------------------------------------------------------------


def tensors(output: Any) -> list[Tensor]:
    """Return the tensors of a model's result that have gradients, in their order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [t for part in output for t in tensors(part)]
    return []


@dataclass
class Step:
    """What one step of training gives, and evaluation after it."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    state: dict[str, Tensor]
    evaluated: list[Tensor]


def step(entry: Entry, model: nn.Module, inputs: dict[str, Tensor]) -> Step:
    """Train the model for one step, and evaluate it."""
    torch.manual_seed(3)  # for dropouts that a forward calls as functions
    model.train()
    outputs = tensors(entry.call(model, inputs))
    loss = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        weights = torch.linspace(-1.0, 1.5, output.numel(), dtype=output.dtype)
        loss = loss + (output * weights.view_as(output)).mean()
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    size = torch.stack([g.norm() for g in gradients.values()]).norm()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in gradients:
                parameter -= (0.01 / size) * gradients[name]
        evaluated = tensors(entry.call(model.eval(), inputs))
    state = {n: t.detach().clone() for n, t in model.state_dict().items()}
    return Step([o.detach() for o in outputs], gradients, state, evaluated)


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def log() -> Iterator[list[str]]:
    """Give the lines that fusereg logs."""
    logger, handler = logging.getLogger("fusereg"), _Lines()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield handler.lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@dataclass
class Outcome:
    """What convert and fold_into_conv did to a model, as the log says.

    Attributes:
        layers: how many layers were converted.
        chains: how many chains were fused.
        norms: how many batch norms the model has.
        folded: how many of them were folded.
        left: each reason why something was left as it is, and how often it was given.
    """

    layers: int
    chains: int
    norms: int
    folded: int
    left: Counter[str]


def outcome(model: nn.Module, converting: list[str], folding: list[str]) -> Outcome:
    """Return what the log of a conversion and of a folding says."""
    layers, chains = re.findall(r"(\d+) layers? converted.*?, (\d+) chains? fused", converting[-1])[
        0
    ]
    left: Counter[str] = Counter()
    for line in (*converting[:-1], *folding):
        said = re.match(r"fusereg.\w+: \S+ (.*?(?:left alone|not fused|stays): .*)", line)
        if said:
            # Without the names of single modules.
            left[re.sub(r"of [\w.]+\.\d[\w.]* \(", "of a module (", said[1])] += 1
    return Outcome(
        layers,
        chains,
        sum(isinstance(m, _BatchNorm) for m in model.modules()),
        sum("folded into" in line for line in folding),
        left,
    )


# --- the page -------------------------------------------------------------------------------------

PAGE = Path(__file__).resolve().parents[1] / "docs" / "zoo.md"


def versions() -> str:
    """Return the versions of the libraries, as the page says them."""
    said = [f"{name} {metadata.version(name).partition('+')[0]}" for name in ("torch", *LIBRARIES)]
    return ", ".join(said)


def row(entry: Entry, found: Outcome) -> str:
    """Return the page's row of a model."""
    left = "; ".join(f"{n} x {why}" if n > 1 else why for why, n in sorted(found.left.items()))
    folded = f"{found.folded} of {found.norms}" if found.norms else "-"
    cells = (f"`{entry.name}`", str(found.layers), str(found.chains), folded, left or "-")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
