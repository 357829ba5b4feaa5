"""The networks that the paper compares EDT with: DiT and MDTv2 (paper, Tables 1 and 2)."""
