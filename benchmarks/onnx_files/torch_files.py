"""The table of torch's files: the nets, and how each is exported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.onnx_files import picture_nets, published, sequence_nets
from benchmarks.onnx_files.picture_nets import classifier, conv

PICTURE = {"image": (3, 32, 32)}
WORDS = {"input_ids": ("int64", 50, 12)}

ENDS: dict[str, Callable[[Tensor], Any]] = {
    "argmax": lambda y: y.argmax(1),
    "softmax": lambda y: y.softmax(1),
    "logsoftmax": lambda y: y.log_softmax(1),
    "sigmoid": torch.sigmoid,
    "both": lambda y: (y.softmax(1), y.argmax(1)),
    "topk": lambda y: y.topk(3, 1),
}


@dataclass(frozen=True, kw_only=True)
class Net:
    """A net, what it reads (shapes of one sample; or type, bound and shape of whole numbers), and its loss."""

    make: Callable[[], nn.Module]
    inputs: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: PICTURE)
    loss: str = "cross_entropy"
    package: str = "torch"


@dataclass(frozen=True, kw_only=True)
class Export:
    """How a net is exported: by which exporter, at which opset, with which fixed batch (0: free), end and layout."""

    dynamo: bool = False
    opset: int = 17
    batch: int = 0
    end: str = ""
    second: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    choices: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    refused: bool = False


def _tv(name: str, **more: Any) -> Net:
    return Net(make=partial(published.torchvision_net, name), package="torchvision", **more)


def _timm(name: str, **more: Any) -> Net:
    return Net(make=partial(published.timm_net, name), package="timm", **more)


def _hf(name: str, inputs: Mapping[str, Any], loss: str = "cross_entropy") -> Net:
    return Net(make=partial(published.transformers_net, name), inputs=inputs, loss=loss, package="transformers")


STEPS, WAVE = {"series": (10, 6)}, {"wave": (1, 120)}
MASKED = {**WORDS, "attention_mask": ("int64", 2, 12)}
MIXED = {"numbers": (5,), "categories": ("int64", 5, 2)}
SE = picture_nets.ChannelAttention

NETS: dict[str, Net] = {
    "resnet": Net(make=picture_nets.resnet),
    "qat": Net(make=picture_nets.Qat),
    "googlenet": Net(make=picture_nets.googlenet),
    "squeezenet": Net(make=picture_nets.squeezenet),
    "se_cnn": Net(make=lambda: classifier(conv(3, 16, 3, 2), SE(16), conv(16, 32), SE(32), width=32)),
    "cbam": Net(make=lambda: classifier(conv(3, 16, 3, 2), picture_nets.Cbam(16), conv(16, 32), width=32)),
    "ghost": Net(make=lambda: classifier(conv(3, 8, 3, 2), picture_nets.Ghost(8, 15), conv(15, 16), width=16)),
    "unet": Net(make=picture_nets.UNet),
    "unet_mask": Net(make=picture_nets.UNet, loss="bce"),
    "unet_bilinear": Net(make=partial(picture_nets.UNet, transposed=False)),
    "deeplab": Net(make=picture_nets.DeepLab),
    "yolov5": Net(make=partial(picture_nets.Detector, 5), loss="mse"),
    "yolov8": Net(make=partial(picture_nets.Detector, 8), loss="mse"),
    "yolov8_raw": Net(make=partial(picture_nets.Detector, 8, decoded=False), loss="own"),
    "ssd": Net(make=picture_nets.Ssd, loss="own"),
    "lstm": Net(make=sequence_nets.Recurrent, inputs=STEPS),
    "lstm_both": Net(make=partial(sequence_nets.Recurrent, bidirectional=True, num_layers=2), inputs=STEPS),
    "lstm_state": Net(make=partial(sequence_nets.Recurrent, read="state"), inputs=STEPS),
    "lstm_projected": Net(make=partial(sequence_nets.Recurrent, proj_size=5), inputs=STEPS),
    "gru": Net(make=partial(sequence_nets.Recurrent, "GRU"), inputs=STEPS),
    "gru_second": Net(make=partial(sequence_nets.Recurrent, "GRU", first=False), inputs=STEPS),
    "rnn": Net(make=partial(sequence_nets.Recurrent, "RNN", read="state"), inputs=STEPS),
    "tcn": Net(make=sequence_nets.Tcn, inputs={"series": (4, 24)}),
    "wavenet": Net(make=sequence_nets.WaveNet, inputs={"wave": (1, 40)}),
    "vit": Net(make=picture_nets.VisionTransformer),
    "deit": Net(make=partial(picture_nets.VisionTransformer, distilled=True)),
    "mixer": Net(make=picture_nets.Mixer),
    "gmlp": Net(make=partial(picture_nets.Mixer, gated=True)),
    "whisper": Net(make=sequence_nets.Speech, inputs={"mel": (8, 24)}),
    "wav2vec": Net(make=sequence_nets.Wav2Vec, inputs=WAVE),
    "autoencoder": Net(
        make=lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Sigmoid()
        ),
        loss="mse",
    ),
    "vae": Net(make=sequence_nets.Vae, inputs={"x": (20,)}, loss="mse"),
    "vae_noise": Net(make=partial(sequence_nets.Vae, noise=True), inputs={"x": (20,)}, loss="mse"),
    "siamese": Net(make=picture_nets.Siamese, inputs={"left": (1, 16, 16), "right": (1, 16, 16)}),
    "bags": Net(make=sequence_nets.Bags, inputs=WORDS),
    "text_cnn": Net(make=sequence_nets.TextCnn, inputs=WORDS),
    "tabular": Net(make=sequence_nets.Tabular, inputs=MIXED),
    "srgan": Net(make=picture_nets.Srgan, inputs={"image": (3, 12, 12)}, loss="mse"),
    "pointnet": Net(make=sequence_nets.PointNet, inputs={"points": (20, 3)}),
    "depth": Net(make=picture_nets.DepthMap, inputs={"image": (3, 17, 17)}, loss="mse"),
    "conformer": Net(make=sequence_nets.Conformer, inputs={"frames": (12, 16)}),
    "gcn": Net(make=sequence_nets.Graphs, inputs={"adjacency": (7, 7), "nodes": (7, 5)}),
    "mlp": Net(
        make=lambda: nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 1)),
        inputs={"x": (12,)},
        loss="mse",
    ),
    **{f"tv_{n}": _tv(n) for n in ("mobilenet_v2", "mobilenet_v3", "efficientnet", "efficientnet_v2", "densenet")},
    **{f"tv_{n}": _tv(n) for n in ("shufflenet_v2", "mnasnet", "convnext", "regnet", "vgg", "vit", "swin", "swin_v2")},
    "tv_deeplab_v3": _tv("deeplab_v3"),
    **{f"timm_{n}": _timm(n) for n in ("ghostnet_050", "gmlp", "mixer", "seresnet18", "resnet18")},
    **{f"timm_{n}": _timm(n) for n in ("deit_tiny_distilled_patch16_224", "test_convnext", "xcit_nano_12_p16_224")},
    "timm_test_vit": _timm("test_vit"),
    "bert": _hf("bert", MASKED),
    "bert_words": _hf("bert_words", WORDS),
    "distilbert": _hf("distilbert", MASKED),
    "gpt2": _hf("gpt2", WORDS, "mse"),
    "llama": _hf("llama", WORDS, "mse"),
    "t5": _hf("t5", WORDS, "mse"),
    "hf_whisper": _hf("whisper", {"input_features": (8, 24)}, "mse"),
    "hf_wav2vec2": _hf("wav2vec2", {"input_values": (120,)}),
    "hf_vit": _hf("vit", {"pixel_values": (3, 32, 32)}),
    "segformer": _hf("segformer", {"pixel_values": (3, 32, 32)}),
}

TRAINING = {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False}
OLD, NEW = Export, partial(Export, dynamo=True, opset=18)

# A file per line: the net and how it is exported. Opsets 11 to 23 and fixed batches are spread over them.
FILES: dict[str, tuple[Export, ...]] = {
    "resnet": (
        OLD(opset=7),
        OLD(opset=11),
        OLD(batch=1),
        OLD(dtype=torch.float16),
        OLD(options=TRAINING),
        NEW(),
        NEW(opset=23, batch=1),
        OLD(end="softmax"),
    ),
    "qat": (OLD(opset=13),),
    "googlenet": (OLD(opset=12), NEW(opset=19)),
    "squeezenet": (OLD(opset=11, batch=1, end="softmax"), NEW(opset=20)),
    "se_cnn": (OLD(opset=13), NEW(batch=1)),
    "cbam": (OLD(opset=14), NEW(opset=18)),
    "ghost": (OLD(batch=1), NEW()),
    "unet": (OLD(opset=11), OLD(end="argmax", batch=1), NEW(opset=21), OLD(opset=9)),
    "unet_mask": (OLD(end="sigmoid"),),
    "unet_bilinear": (OLD(opset=13), NEW(opset=18)),
    "deeplab": (OLD(end="argmax"), NEW(opset=22, end="argmax", batch=1)),
    "yolov5": (OLD(opset=12, batch=1), NEW()),
    "yolov8": (OLD(batch=1), OLD(), NEW(opset=19)),
    "yolov8_raw": (OLD(),),
    "ssd": (OLD(opset=11),),
    "lstm": (OLD(opset=8, refused=True), OLD(opset=11), OLD(batch=1), NEW()),
    "lstm_both": (OLD(opset=14), NEW(opset=20)),
    "lstm_state": (OLD(),),
    "lstm_projected": (NEW(refused=True),),
    "gru": (OLD(opset=13), NEW(opset=18)),
    "gru_second": (OLD(second=True), OLD(second=True, batch=1)),
    "rnn": (OLD(),),
    "tcn": (OLD(opset=11), NEW()),
    "wavenet": (OLD(), NEW(opset=21)),
    "vit": (OLD(opset=14), OLD(batch=1), NEW(opset=23)),
    "deit": (OLD(), NEW()),
    "mixer": (OLD(opset=13), NEW(opset=22)),
    "gmlp": (OLD(), NEW()),
    "whisper": (OLD(opset=14), NEW(opset=20)),
    "wav2vec": (OLD(), NEW()),
    "autoencoder": (OLD(opset=11), NEW()),
    "vae": (OLD(), NEW()),
    "vae_noise": (OLD(),),
    "siamese": (OLD(opset=12), NEW()),
    "bags": (OLD(refused=True),),
    "text_cnn": (OLD(opset=15), NEW()),
    "tabular": (OLD(opset=16), NEW()),
    "srgan": (OLD(), NEW()),
    "pointnet": (OLD(end="logsoftmax"), NEW(end="logsoftmax")),
    "depth": (OLD(opset=18), NEW(opset=18)),
    "conformer": (OLD(), NEW(opset=23)),
    "gcn": (OLD(opset=12), NEW(opset=18)),
    "mlp": (OLD(options=TRAINING), NEW(opset=18), OLD(dtype=torch.float64)),
    "tv_mobilenet_v2": (OLD(opset=10), OLD(opset=11), OLD(batch=1), NEW(opset=18)),
    "tv_mobilenet_v3": (OLD(opset=13), NEW()),
    "tv_efficientnet": (OLD(), NEW(opset=19)),
    "tv_efficientnet_v2": (OLD(batch=4),),
    "tv_densenet": (OLD(opset=12), NEW()),
    "tv_shufflenet_v2": (OLD(opset=11), NEW()),
    "tv_mnasnet": (OLD(opset=16),),
    "tv_convnext": (OLD(opset=14), NEW()),
    "tv_regnet": (OLD(), NEW(opset=21)),
    "tv_vgg": (OLD(opset=11, batch=1), NEW()),
    "tv_vit": (OLD(), NEW()),
    "tv_swin": (OLD(batch=1), NEW()),
    "tv_swin_v2": (OLD(),),
    "tv_deeplab_v3": (OLD(opset=11, end="argmax"),),
    "timm_ghostnet_050": (OLD(), NEW()),
    "timm_gmlp": (OLD(),),
    "timm_mixer": (NEW(),),
    "timm_seresnet18": (OLD(opset=13),),
    "timm_resnet18": (OLD(options=TRAINING),),
    "timm_deit_tiny_distilled_patch16_224": (OLD(), NEW()),
    "timm_test_convnext": (OLD(),),
    "timm_xcit_nano_12_p16_224": (OLD(),),
    "timm_test_vit": (NEW(),),
    "bert": (OLD(opset=14), NEW()),
    "bert_words": (OLD(),),
    "distilbert": (OLD(opset=14), NEW()),
    "gpt2": (NEW(),),
    "llama": (NEW(),),
    "t5": (OLD(),),
    "hf_whisper": (OLD(),),
    "hf_wav2vec2": (OLD(), NEW()),
    "hf_vit": (OLD(opset=14, end="both"), NEW()),
    "segformer": (OLD(),),
}
