"""Whole runs: the demo's drawn world, and the commands' stages put one after another."""
