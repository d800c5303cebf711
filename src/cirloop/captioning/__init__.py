"""Mined negatives -> augmented triplets: a foundation model writes texts, named checks accept or
reject."""

from cirloop.captioning.config import CaptioningSettings, FoundationConfig

__all__ = ["CaptioningSettings", "FoundationConfig"]
