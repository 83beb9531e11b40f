"""What the examples of Hugging Face's Trainer and accelerate share."""
