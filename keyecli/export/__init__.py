"""Spans and chapters as files that players, editors and programs read."""
