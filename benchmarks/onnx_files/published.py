"""Small configurations of the nets of torchvision, timm and transformers, with random weights."""

from __future__ import annotations

from contextlib import suppress
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn


@cache
def declare_nms() -> torch.library.Library:
    """Let torchvision be imported where its compiled operators are of another build of torch: it asks for these two."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    with suppress(RuntimeError):  # they are there
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def torchvision_net(name: str) -> nn.Module:
    declare_nms()
    from torchvision import models
    from torchvision.models.convnext import CNBlockConfig
    from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig
    from torchvision.models.mobilenetv3 import InvertedResidualConfig
    from torchvision.models.regnet import BlockParams
    from torchvision.models.segmentation.deeplabv3 import ASPP
    from torchvision.models.swin_transformer import SwinTransformerBlockV2

    def v3_block(*sizes: Any) -> InvertedResidualConfig:
        return InvertedResidualConfig(*sizes, width_mult=1.0)

    mb = [MBConvConfig(1, 3, 1, 16, 8, 1, 1, 1), MBConvConfig(4, 5, 2, 8, 16, 2, 1, 1)]
    v3 = [v3_block(8, 3, 16, 8, True, "RE", 2, 1), v3_block(8, 5, 24, 16, True, "HS", 2, 1)]
    swin: dict[str, Any] = {
        "patch_size": [4, 4],
        "embed_dim": 16,
        "depths": [2],
        "num_heads": [2],
        "window_size": [4, 4],
    }
    blocks = [CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)]
    regnet = BlockParams([1, 1], [16, 32], [8, 8], [1, 1], [2, 2], 0.25)
    makers: dict[str, Any] = {
        "mobilenet_v2": partial(models.MobileNetV2, 10, 0.25, [[1, 16, 1, 1], [4, 24, 2, 2]]),
        "mobilenet_v3": partial(models.MobileNetV3, v3, 32, 10),
        "efficientnet": partial(models.EfficientNet, mb, 0.2, num_classes=10),
        "efficientnet_v2": partial(
            models.EfficientNet, [FusedMBConvConfig(4, 3, 2, 16, 8, 1), *mb[1:]], 0.2, num_classes=10
        ),
        "densenet": partial(models.DenseNet, 8, (2, 2), 16, num_classes=10),
        "shufflenet_v2": partial(models.ShuffleNetV2, [2, 1, 1], [8, 16, 32, 32, 32], 10),
        "mnasnet": partial(models.MNASNet, 0.1, 10),
        "convnext": partial(models.ConvNeXt, blocks, num_classes=10),
        "regnet": partial(models.RegNet, regnet, 10, 16),
        "vgg": lambda: models.VGG(models.vgg.make_layers([8, "M", 16, "M", 16, "M"], True), 10),
        "vit": partial(models.VisionTransformer, 32, 8, 2, 2, 16, 32, num_classes=10),
        "swin": partial(models.SwinTransformer, **swin, num_classes=10),
        "swin_v2": partial(models.SwinTransformer, **swin, num_classes=10, block=SwinTransformerBlockV2),
        "deeplab_v3": lambda: nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), ASPP(16, [2, 4], 16), nn.Conv2d(16, 4, 1)),
    }
    net: nn.Module = makers[name]()
    if name == "vgg":
        net.avgpool, net.classifier = (
            nn.AdaptiveAvgPool2d(2),
            nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
        )
    return net


def timm_net(name: str) -> nn.Module:
    declare_nms()
    import timm
    from timm.layers import GatedMlp
    from timm.models.mlp_mixer import MlpMixer, SpatialGatingBlock

    mixer: dict[str, Any] = {"num_classes": 10, "img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 16}
    if name == "mixer":
        return MlpMixer(**mixer)
    if name == "gmlp":
        return MlpMixer(**mixer, mlp_ratio=2, block_layer=SpatialGatingBlock, mlp_layer=GatedMlp)
    resnet: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (8, 16, 16, 32)}
    options: dict[str, dict[str, Any]] = {
        "deit_tiny_distilled_patch16_224": {"depth": 2, "embed_dim": 24, "patch_size": 8, "img_size": 32},
        "resnet18": resnet,
        "seresnet18": {**resnet, "stem_width": 8},
        "test_vit": {"img_size": 32},
        "xcit_nano_12_p16_224": {"depth": 1, "embed_dim": 16, "num_heads": 2, "img_size": 32},
    }
    net: nn.Module = timm.create_model(name, num_classes=10, **options.get(name, {}))
    return net


class Logits(nn.Module):
    """One output of a net of transformers, which returns several by name."""

    def __init__(self, net: nn.Module, field: str, arguments: tuple[str, ...]) -> None:
        super().__init__()
        self.net, self.field, self.arguments = net, field, arguments

    def forward(self, *inputs: Tensor) -> Any:
        return getattr(self.net(**dict(zip(self.arguments, inputs, strict=True)), return_dict=True), self.field)


def transformers_net(name: str) -> nn.Module:
    import transformers as tf

    small: dict[str, Any] = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"intermediate_size": 32, "max_position_embeddings": 32, "num_labels": 3}
    words, masked = ("input_ids",), ("input_ids", "attention_mask")
    distil: dict[str, Any] = {"vocab_size": 60, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
    gpt: dict[str, Any] = {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    llama = {**small, "num_key_value_heads": 1}
    if name == "bert":
        return Logits(tf.BertForSequenceClassification(tf.BertConfig(**small)), "logits", masked)
    if name == "bert_words":
        return Logits(tf.BertForSequenceClassification(tf.BertConfig(**small)), "logits", words)
    if name == "distilbert":
        distil |= {"max_position_embeddings": 32, "num_labels": 3}
        return Logits(tf.DistilBertForSequenceClassification(tf.DistilBertConfig(**distil)), "logits", masked)
    if name == "gpt2":
        return Logits(tf.GPT2LMHeadModel(tf.GPT2Config(**gpt, use_cache=False)), "logits", words)
    if name == "llama":
        return Logits(tf.LlamaForCausalLM(tf.LlamaConfig(**llama, use_cache=False)), "logits", words)
    if name == "whisper":
        sizes = {"num_mel_bins": 8, "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2}
        config = tf.WhisperConfig(**sizes, encoder_ffn_dim=32, max_source_positions=12, decoder_layers=1)
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        return Logits(WhisperEncoder(config), "last_hidden_state", ("input_features",))
    if name == "wav2vec2":
        sizes = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
        audio = {**small, **sizes, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
        config = tf.Wav2Vec2Config(**audio, classifier_proj_size=16, mask_time_prob=0.0, layerdrop=0.0)
        return Logits(tf.Wav2Vec2ForSequenceClassification(config), "logits", ("input_values",))
    if name == "vit":
        picture = {k: v for k, v in small.items() if k != "vocab_size"} | {"image_size": 32, "patch_size": 8}
        return Logits(tf.ViTForImageClassification(tf.ViTConfig(**picture)), "logits", ("pixel_values",))
    if name == "t5":
        sizes = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        config = tf.T5Config(**sizes, use_cache=False, is_encoder_decoder=False)
        return Logits(tf.T5EncoderModel(config), "last_hidden_state", words)
    if name == "segformer":
        sizes = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16]}
        config = tf.SegformerConfig(
            **sizes,
            num_attention_heads=[1, 2],
            patch_sizes=[7, 3],
            strides=[4, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=16,
            num_labels=4,
        )
        return Logits(tf.SegformerForSemanticSegmentation(config), "logits", ("pixel_values",))
    raise LookupError(name)
