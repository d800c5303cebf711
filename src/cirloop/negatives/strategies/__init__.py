"""Negative strategies, one file each."""
