"""Tests of the operations that cost time."""
