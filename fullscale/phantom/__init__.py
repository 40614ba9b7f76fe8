"""Synthetic abdominal CT with organ labels."""
