"""One file a stage, and what the stages share; the only place where rooms meet."""
