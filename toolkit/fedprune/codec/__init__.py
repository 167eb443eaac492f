"""Codecs of weights and updates: differences, quantisation, sparse indices, packing.

Not here: messages and chunks (`wire`). A codec turns tensors into bytes and back, and nothing else.
"""

from fedprune.codec import weights
from fedprune.codec.choice import CODECS, DOWN, PLAIN, Codec, agreed
from fedprune.codec.packing import is_packed
from fedprune.codec.update import bound, decode, encode

__all__ = ["CODECS", "DOWN", "PLAIN", "Codec", "agreed", "bound", "decode", "encode", "is_packed", "weights"]
