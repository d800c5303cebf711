"""A page to search with a run's models, on this machine."""
