"""The tier of aggregators: servers of regions below the server that decides.

An aggregator has a region's boards: its own broker, uploads, checks and exact sums. The server above it, its *parent*,
selects, plans, ranks and closes rounds. What an aggregator's boards do goes up as events, what the parent's coordinator
orders comes down as commands, with the rows of its state that these need. At the end of a round the parent asks each
aggregator for the sums of exactly the updates that count, and merges them. The sums are whole numbers, so the next
model is bit-identical to that of a server without aggregators.

No decision is made twice and no update is lost between the two: after a broken connection or a crash of either side,
the parent sends its rows again and repeats open commands, and the aggregator repeats the births of its boards. An
aggregator can be the parent of others.
"""
