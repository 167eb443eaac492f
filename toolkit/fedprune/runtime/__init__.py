"""Models and bundles as a board runs them, through onnxruntime."""
