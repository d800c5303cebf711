"""Settings: their base class, the run's configuration, recipes and flags."""
