"""Command line: the bodies of the scripts, and what they share."""
