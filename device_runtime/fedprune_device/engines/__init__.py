"""TensorRT engines: built on the board that they serve, checked against onnxruntime, and never trusted further."""
