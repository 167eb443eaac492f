"""The server's loop, and one runner per job: messages in, one transaction per turn, commands out.

Not here: computation (`executor`), bytes of blobs (`transfer`), wiring (`app`).
"""
