"""Mined negatives -> augmented triplets: a foundation model writes the text, named checks accept or reject it."""

from cirloop.captioning.config import CaptioningSettings, FoundationConfig

__all__ = ["CaptioningSettings", "FoundationConfig"]
