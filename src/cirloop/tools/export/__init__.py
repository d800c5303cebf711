"""A run's model for others: directories that transformers with peft, or sentence-transformers,
load."""
