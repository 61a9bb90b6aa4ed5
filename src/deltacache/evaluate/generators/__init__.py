"""Futures made by any video generator: the context frames it needs, and its frames on the way back."""
