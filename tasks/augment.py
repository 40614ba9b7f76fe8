"""Random changes to training slices, a batch at a time on the training device."""

from __future__ import annotations

import torch
from torch import Tensor

from tasks.params import AugmentParams


class Augment:
    """Rotate, scale and shift image and label together; change contrast and add noise to the image.

    Args:
        params: strengths; 0 switches a change off.
        window_hu: the window that 0 and 1 of the image stand for.
    """

    def __init__(self, params: AugmentParams, window_hu: tuple[float, float]) -> None:
        from kornia.augmentation import AugmentationSequential, RandomAffine

        self._noise = params.noise_hu / (window_hu[1] - window_hu[0])
        self._contrast = params.contrast_fraction
        shift, scale = params.shift_fraction, params.scale_fraction
        self._affine = AugmentationSequential(
            RandomAffine(
                degrees=params.rotation_deg,
                translate=(shift, shift),
                scale=(1 - scale, 1 + scale),
                p=1.0,
            ),
            data_keys=["input", "mask"],
        )

    def __call__(self, image_BCHW: Tensor, label_BHW: Tensor) -> tuple[Tensor, Tensor]:
        """Change a batch.

        Args:
            image_BCHW: float32 in 0..1 (window units).
            label_BHW: uint8 label map; follows the image's geometry by nearest neighbour.

        Returns:
            Image and label of the same shapes and types.
        """
        moved = self._affine(image_BCHW, label_BHW[:, None].to(image_BCHW.dtype))
        image_BCHW, label_BHW = moved[0], moved[1][:, 0].round().to(label_BHW.dtype)
        per_image = (len(image_BCHW), 1, 1, 1)
        gain = 1 + self._contrast * (2 * torch.rand(per_image, device=image_BCHW.device) - 1)
        noise = torch.randn_like(image_BCHW) * self._noise
        return ((image_BCHW - 0.5) * gain + 0.5 + noise).clamp(0, 1), label_BHW
