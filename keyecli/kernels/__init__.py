"""The operations that cost time; `reference` defines each one in plain PyTorch."""
