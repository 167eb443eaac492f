"""Identity: keys, certificates, signed envelopes, join tokens, replay protection, TLS.

Not here: who is let in (the server's `enrollment`) and how a board asks (the board's `network`).
"""
