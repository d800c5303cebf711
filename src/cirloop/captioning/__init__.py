"""Mined negatives -> augmented triplets: a foundation model writes texts, named checks accept or
reject them."""

from cirloop.captioning.config import CaptioningSettings
from cirloop.captioning.foundation import FoundationConfig

__all__ = ["CaptioningSettings", "FoundationConfig"]
