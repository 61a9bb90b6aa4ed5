"""Heads on frozen features: segmentation, depth, RGB, and those of Table D."""
