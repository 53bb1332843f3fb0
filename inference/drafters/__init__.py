"""Drafters: where guesses of the next tokens come from. One file each; ``inference.drafting`` has them by name."""
