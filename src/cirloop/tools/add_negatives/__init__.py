"""The stand-alone tool that adds a hard negative to samples of an image and a text each
(`add_hard_negatives.py`)."""
