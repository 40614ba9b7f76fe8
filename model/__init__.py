"""Networks, losses, metrics and inference on tensors. torch only; nothing here touches disk layouts."""
