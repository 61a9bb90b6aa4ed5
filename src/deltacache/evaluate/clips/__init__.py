"""Evaluation on feature datasets: sequences of cached clips, rollouts, scenes whose futures are known."""
