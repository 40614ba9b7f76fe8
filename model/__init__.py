"""Networks, losses and inference on tensors. torch only; no files."""
