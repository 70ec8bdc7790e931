"""From a file to chunks of frames with their presentation times."""
