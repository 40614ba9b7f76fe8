"""Time and memory of a prediction beside those of nnU-Net."""
