"""Learning: laying out supervised batches and optimising in mixed precision."""
