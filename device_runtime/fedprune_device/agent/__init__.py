"""The loop that answers the server: offers, cancellations, acknowledgements, announcements.

Not here: heavy work. The loop starts threads and looks at their results.
"""
