"""Reading what others wrote, and showing it safely."""
