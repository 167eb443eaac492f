"""Membership: joining with a claim or by approval, renewing the certificate.

Not here: keys and certificates as such (`fedprune.security`).
"""
