"""Codecs of what travels: an update as its difference to the weights that were sent, in fewer bytes."""

from fedprune.codec import weights
from fedprune.codec.choice import CODECS, DOWN, PLAIN, Codec, agreed
from fedprune.codec.packing import is_packed
from fedprune.codec.update import bound, decode, encode

__all__ = ["CODECS", "DOWN", "PLAIN", "Codec", "agreed", "bound", "decode", "encode", "is_packed", "weights"]
