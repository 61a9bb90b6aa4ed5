"""What lies on disk: plan, shards in their two forms, receipts, merged tables; making, reading and mending it."""
