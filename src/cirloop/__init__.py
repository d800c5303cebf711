"""cirloop: an iterative trainer for composed image retrieval (CIR)."""

__version__ = "0.1.0"
