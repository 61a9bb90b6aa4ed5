"""The published benchmarks as they lie on disk: which frames make a sequence, pictures, labels, geometry."""
