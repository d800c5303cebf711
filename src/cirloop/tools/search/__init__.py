"""Searching with a run's models: a folder of images, or the gallery that the run evaluates on."""
