"""The offline jobs: sampling, decoding, encoding, and datasets on disk. One module imports ray."""
