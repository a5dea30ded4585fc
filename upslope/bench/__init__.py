"""Comparisons of whole families of methods."""
