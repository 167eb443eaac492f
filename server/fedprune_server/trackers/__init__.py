"""Experiment trackers: TensorBoard, MLflow, Weights & Biases, by their own libraries; a module in `tools` is one more.

Not here: when rounds are written (`monitoring`), and the setting that chooses trackers (`config`).
"""
