"""Attributes of what a text asks for and of what an image shows, for the strategies that compare
the two."""
