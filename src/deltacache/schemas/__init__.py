"""What the stages agree on: configs, clip types, table schemas and errors. Imports no torch."""
