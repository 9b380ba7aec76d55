"""Hugging Face models on disk: found, checked, loaded and saved. Import from the modules."""
