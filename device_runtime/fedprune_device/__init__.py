"""The board: trains, predicts and reports, without torch or onnx."""
