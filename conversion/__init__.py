"""Original checkpoints in, original checkpoints out."""
