"""The commands of `fedprune-flash`, one module per verb: kits, images, cards, Jetsons.

Not here: what the commands do (`kit`, `image`, `card`).
"""
