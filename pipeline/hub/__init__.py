"""A cache to the Hugging Face Hub and back, with its data card."""
