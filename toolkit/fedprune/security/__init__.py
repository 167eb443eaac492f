"""Identity: who a server and a device are to each other, over a broker that neither has to trust.

Signing keys and envelopes prove who said something, windows that it is said once; claims let a device in, an authority
gives it the certificate with which it connects. Boards run all of it.
"""
