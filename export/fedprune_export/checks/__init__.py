"""Numeric checks of models and bundles: parity of a cut, trial steps, accuracy on labelled data.

Not here: checks of a finished bundle's folder (`bundles.verification`).
"""
