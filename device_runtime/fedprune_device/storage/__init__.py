"""The state directory: current offer, pending update, session number, local tensors, owner.

Not here: samples (`data`) and installed releases (`launcher`).
"""
