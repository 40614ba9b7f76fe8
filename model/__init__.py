"""Networks, losses, metrics and inference on tensors. torch only; no files."""
