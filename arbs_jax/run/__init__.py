"""What one training run keeps on disk: its folder, configuration, metrics, plots and checkpoints."""
