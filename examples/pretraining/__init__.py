"""The parts of the pre-training example: its options, data, training loop and report."""
