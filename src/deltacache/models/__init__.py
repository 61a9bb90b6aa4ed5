"""Backbone, DeltaTok and DeltaWorld: single-device torch modules that take plain arguments."""
