"""The commands around the loop."""
