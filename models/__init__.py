"""Decoder-only language models as plain torch modules, and their Hugging Face form."""
