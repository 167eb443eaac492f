"""The commands of `fedprune-flash`, one module per verb: kits, images, cards, boards over SSH.

Not here: what the commands do (`kit`, `image`, `card`, `ssh`).
"""
