"""Give each input the compute it needs, and no more."""
