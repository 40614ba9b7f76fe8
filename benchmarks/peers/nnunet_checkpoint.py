"""Write a checkpoint of nnU-Net with random weights. Runs in nnU-Net's own environment.

    python nnunet_checkpoint.py PREPROCESSED RESULTS CONFIGURATION

PREPROCESSED is the dataset's folder below nnUNet_preprocessed, RESULTS that below nnUNet_results.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

NUM_CHANNELS = 1


def main() -> None:
    """Write it."""
    preprocessed, results, configuration = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    plans = PlansManager(str(preprocessed / "nnUNetPlans.json"))
    dataset = json.loads((preprocessed / "dataset.json").read_text())
    torch.manual_seed(0)
    network = nnUNetTrainer.build_network_architecture(
        plans,
        plans.get_configuration(configuration),
        NUM_CHANNELS,
        plans.get_label_manager(dataset).num_segmentation_heads,
        enable_deep_supervision=False,
    )
    folder = results / f"nnUNetTrainer__nnUNetPlans__{configuration}"
    (folder / "fold_0").mkdir(parents=True)
    shutil.copy(preprocessed / "nnUNetPlans.json", folder / "plans.json")
    shutil.copy(preprocessed / "dataset.json", folder)
    checkpoint = {
        "network_weights": network.state_dict(),
        "init_args": {"configuration": configuration},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1),
    }
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")


if __name__ == "__main__":
    main()
