"""Simulated boards, and the runners that compute their training."""
