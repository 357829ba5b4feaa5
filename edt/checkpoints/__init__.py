"""Weights on disk: checkpoint folders, the release's .pt files, and models loaded from both."""
