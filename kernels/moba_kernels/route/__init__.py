"""The gate: scores of queries against chunk means, and the choice of topk - 1 candidates."""
