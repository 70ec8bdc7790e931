"""Running the network: the plan of a run, the streamed prefill and token-by-token generation."""
