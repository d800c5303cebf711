"""What a run tells while it works: events, costs, trackers, the console, logs."""
