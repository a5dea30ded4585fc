"""Wing 1: tabular MDPs, the ground truth."""
