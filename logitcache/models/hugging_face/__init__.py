"""Models of Hugging Face's transformers: an optional dependency."""
