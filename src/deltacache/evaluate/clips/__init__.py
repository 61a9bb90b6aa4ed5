"""Evaluation on feature datasets: sequences of cached clips, roll-outs, scenes whose futures are known."""
