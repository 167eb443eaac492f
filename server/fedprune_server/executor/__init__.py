"""The heavy work that a coordinator orders: submodels, sums, checks and measurements, here or by helpers."""
