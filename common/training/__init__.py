"""One training run: data loader, memory plan, checkpoints, export."""
