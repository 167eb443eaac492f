"""Numeric checks of what was made: parity of a cut, trial steps, accuracy on labelled data.

Not here: checks of a finished bundle's folder (`bundles.verification`).
"""
