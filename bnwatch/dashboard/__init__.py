"""The tab **BN Watch** in TensorBoard."""
