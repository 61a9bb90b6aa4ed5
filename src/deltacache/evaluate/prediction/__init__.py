"""Futures of one video: as tensors, as a page, as a movie."""
