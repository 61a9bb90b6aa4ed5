"""deltacache: cache DINOv3 patch tokens and delta tokens once, then train and evaluate world models."""

__version__ = "0.1.0"
