"""What models cost: products counted on the meta device, time and memory measured (the paper's Tables 2 and B)."""
