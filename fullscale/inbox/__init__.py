"""Receive annotated scans that arrive in a folder or a bucket."""
