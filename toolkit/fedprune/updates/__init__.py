"""Updates on their way: codecs (differences, quantisation, sparse indices, packing) and the noise that privacy adds.

Not here: messages and chunks (`wire`), and a board owner's own privacy rules (`fedprune_device.privacy`).
"""

from fedprune.updates import weights
from fedprune.updates.codecs import (
    AUTO,
    CODECS,
    DOWNLOAD_CODECS,
    HALF_CODEC,
    NO_CODECS,
    PLAIN,
    Codec,
    Codecs,
    agreed_codec,
)
from fedprune.updates.packing import is_packed
from fedprune.updates.update import decode, encode, max_update_bytes

__all__ = [
    "AUTO",
    "CODECS",
    "DOWNLOAD_CODECS",
    "HALF_CODEC",
    "NO_CODECS",
    "PLAIN",
    "Codec",
    "Codecs",
    "agreed_codec",
    "decode",
    "encode",
    "is_packed",
    "max_update_bytes",
    "weights",
]
