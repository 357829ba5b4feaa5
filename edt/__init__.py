"""EDT, the Efficient Diffusion Transformer (Chen et al., NeurIPS 2024, arXiv 2410.23788)."""

__version__ = "0.1.0"
