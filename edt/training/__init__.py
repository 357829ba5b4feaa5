"""Training: configuration, one step, the loop around it, and the folder of a run."""
