"""Trained networks on disk, and a scan through one of them."""
