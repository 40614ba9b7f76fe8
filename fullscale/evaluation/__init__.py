"""Scores, statistics and the promotion gate."""
