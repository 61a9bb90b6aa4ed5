"""Paired differences between two evaluations, with intervals."""
