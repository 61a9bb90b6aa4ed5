"""What lies on disk: plan, shards in their two forms, receipts, merged tables; writing, reading and repairing it."""
