"""What every training run needs and no formula does: directories, checkpoints, metrics, progress, randomness."""
