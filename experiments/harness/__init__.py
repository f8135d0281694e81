"""What all experiments share: options, run directory, training with checkpoints, results, pictures."""
