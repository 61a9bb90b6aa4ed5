"""Trainers of the tokenizer and the world model: one loop, one process."""

from deltacache.train.tokenizer import train_tokenizer
from deltacache.train.world import train_world

__all__ = ["train_tokenizer", "train_world"]
