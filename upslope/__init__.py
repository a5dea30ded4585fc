"""Upslope: policy gradients from a gridworld to a language model."""
