"""The parts of fine-tuning on multiple-choice questions: data, methods, training loop."""
