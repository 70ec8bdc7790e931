"""The network and its files: configuration, vision tower, decoder, cache, checkpoint and prompt layout."""
