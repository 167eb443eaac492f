"""Rounds per minute of simulated FedAvg: fedprune's simulator, a loop in torch, and Flower's simulation.

`tasks` has the nets and shares, `local_training` what a device does in torch, `stamps` counts time and work. `ours`,
`torch_loop` and `flower_app` are the three ways, each a program that reads one folder of `material`. Without fedprune
are `tasks`, `local_training`, `stamps` and `flower_app`: they run in an environment with Flower.
"""
