"""What a run keeps: stores, atomic writes, schemas, the run's lock and rows."""
