"""The folder that a board gets: what is in it, how it is written whole, and conversion to ONNX and torch."""
