"""Metrics of methods on sequences, as rows of a table, and the report that a person looks at."""
