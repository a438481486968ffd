"""Context parallelism: process groups, shards of a row, and attention over a row that several ranks hold."""
