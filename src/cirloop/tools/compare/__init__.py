"""`cirloop compare`: runs side by side, on the queries that they share."""
