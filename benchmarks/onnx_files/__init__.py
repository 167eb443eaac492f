"""A hundred ONNX files as people have them, and what becomes of them: `python -m benchmarks.onnx_files`."""
