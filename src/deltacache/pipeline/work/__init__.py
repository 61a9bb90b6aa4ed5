"""What encoder processes do, free of Ray: models, shards, attempts, and how many of which size."""
