"""Model files and the decoder."""
