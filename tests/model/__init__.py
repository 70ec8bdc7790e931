"""Tests of the network and its files."""
