"""Forward passes: the predictor, the slots of the active model, reduced precision.

Not here: answering applications (`api`) and TensorRT (`engines`).
"""
