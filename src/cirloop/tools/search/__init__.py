"""Searching with a run's models: a folder of pictures, or the gallery that the run evaluates on."""
