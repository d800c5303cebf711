"""What people run besides the loop. Nothing imports it."""
