"""Synthesize images from a teacher alone, by DeepInversion."""
