"""TensorRT engines: built in a child process, cached, and checked against onnxruntime.

Not here: engines from elsewhere. An engine serves only on the board that built it.
"""
