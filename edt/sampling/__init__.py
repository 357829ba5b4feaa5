"""Sampling: configuration, images from a model, and the files they are written to."""
