"""The runtime's own life on a board: releases in two slots, a launcher that goes back by itself, and its service."""
