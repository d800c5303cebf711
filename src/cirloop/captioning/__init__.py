"""Mined negatives -> augmented triplets: a foundation model writes texts, named checks accept or
reject them."""

from cirloop.captioning.config import CaptioningSettings
from cirloop.captioning.foundation import FoundationConfig

__all__ = ["CaptioningSettings", "FoundationConfig"]
CAPTIONERS = {
    "generic": "cirloop.captioning.backends.hf_captioner:HFCaptioner",
    "llava": "cirloop.captioning.backends.hf_captioner:LlavaCaptioner",
    "qwen2_vl": "cirloop.captioning.backends.qwen_vl:QwenVLCaptioner",
    "qwen2_5_vl": "cirloop.captioning.backends.qwen_vl:Qwen25VLCaptioner",
    "qwen3_vl": "cirloop.captioning.backends.qwen_vl:Qwen3VLCaptioner",
}
"""Type of settings -> the captioner of transformers' models, imported when one is built."""
