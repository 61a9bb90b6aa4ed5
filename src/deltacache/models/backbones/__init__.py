"""Encoders of transformers behind ``models/backbone.py``: how each is read, and how each is given an image."""
