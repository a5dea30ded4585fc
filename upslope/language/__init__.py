"""Wing 3: post-training language models."""
