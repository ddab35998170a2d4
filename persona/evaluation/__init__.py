"""Measuring: episodes, who plays in them, statistics, results on disk; judges, endpoints and the report beside."""
