"""Training data that people have: reading it as it is, and checking it against its videos."""

from keyecli.training.data.source import DataFile, open_data

__all__ = ["DataFile", "open_data"]
