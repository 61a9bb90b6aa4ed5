"""Confidence intervals by resampling sequences."""

import numpy as np

RESAMPLES = 1000
CONFIDENCE = 0.95
_CHUNK_COUNTS = 10_000_000  # resampling counts held at a time


def bootstrap_means(values: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Means of resampled sequences.

    Args:
        values: (sequences, columns); every column sees the same resampled sequences.

    Returns:
        (resamples, columns) float64.
    """
    sequences = values.shape[0]
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_COUNTS // sequences)
    means = []
    for start in range(0, resamples, chunk):
        # How often each sequence is drawn in n draws with replacement is one multinomial draw.
        counts = rng.multinomial(
            sequences, np.full(sequences, 1 / sequences), size=min(chunk, resamples - start)
        )
        means.append(counts @ values.astype(np.float64) / sequences)
    return np.concatenate(means)


def bootstrap_intervals(values: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Percentile bootstrap of the mean over sequences (Efron 1979): 95 %, 1000 resamples.

    Args:
        values: (sequences, columns).

    Returns:
        (columns, 2) float64: low and high.
    """
    tail = (1 - CONFIDENCE) / 2
    return np.quantile(bootstrap_means(values, seed=seed), [tail, 1 - tail], axis=0).T
