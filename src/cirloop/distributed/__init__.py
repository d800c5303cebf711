"""Several processes: the launcher, its workers, and work shared out among them."""
