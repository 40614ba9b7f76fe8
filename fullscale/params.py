"""Frozen models of params.yaml; unknown keys and impossible combinations are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from fullscale.runtime.cpu_kernels import CpuKernels
from fullscale.runtime.errors import StageError

OLD_KEYS = {
    "evaluate.ablate_gate": "is now called evaluate.ablate_slice_classifier; rename it",
    "evaluate.min_false_positive_px": (
        "is replaced by evaluate.min_false_positive_mm2, an area in mm2, so that it means the same "
        "in scans of any pixel size; write pixels x area of a pixel there"
    ),
    "register.min_cases": "is now called register.min_patients; rename it",
    "split.seed": "has no use any more, because hashes choose the validation patients; remove it",
    "split.val_fraction": (
        "is replaced by split.folds, the number of folds (val_fraction 0.2 is folds: 5), and "
        "split.val_fold, the one that validates (val_fold: 0); write these two instead"
    ),
    "train.seed": (
        "is now the list `seeds` beside `networks`: each network is trained once with each of "
        "them; remove it and write `seeds: [0]` there"
    ),
}
"""Keys of older versions, and what became of them, for messages."""

Fraction = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]


def _check_label(value: int | str) -> int | str:
    if value == "" or (isinstance(value, int) and value < 1):
        raise ValueError("must be the name of a label, or its number, at least 1")
    return value


Label = Annotated[int | str, AfterValidator(_check_label)]
Share = Annotated[float, Field(ge=0, le=1)]


class ParamsSection(BaseModel):
    """A section of params.yaml: immutable; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ComputeParams(ParamsSection):
    """Settings of where work runs and how often it is saved; they change no result."""

    backend: Literal["local", "dask"] = Field(
        default="local",
        description="run parallel work on this machine, or on a Dask cluster",
    )
    address: str | None = Field(
        default=None,
        description="the Dask scheduler, such as tcp://host:8786; needed for dask",
    )
    num_workers: int = Field(default=0, ge=0, description="processes at a time; 0 uses every core")
    num_loader_workers: int | None = Field(
        default=None,
        ge=0,
        description=(
            "processes that read slices for a training; null means none on a CPU and up to "
            "8 for each GPU process"
        ),
    )
    checkpoint_interval_s: float = Field(
        default=60,
        ge=0,
        description=(
            "seconds between two checkpoints of a training; a kill loses at most this much work"
        ),
    )

    @model_validator(mode="after")
    def _dask_needs_address(self) -> Self:
        if self.backend == "dask" and not self.address:
            raise ValueError(
                "backend dask needs the address of a scheduler, such as tcp://host:8786"
            )
        return self


class SliceParams(ParamsSection):
    """Stage slice: from scans to square, windowed slices."""

    size_px: int = Field(ge=32, le=1024, description="width and height of a slice")
    window_hu: tuple[float, float] = Field(
        description="lower and upper end of the CT window; values outside are clipped",
    )
    pixel_mm: float = Field(
        gt=0,
        le=20,
        description=(
            "distance of neighbouring pixels of a slice in mm; size_px * pixel_mm must cover the "
            "trunk of every patient"
        ),
    )
    neighbour_mm: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        default="auto",
        description=(
            "distance in mm of the slice below and above that a network sees beside the one it "
            "segments; auto is the median slice spacing of the training scans"
        ),
    )
    body_threshold_hu: float = Field(
        description="voxels above this may be body; the slices are centred on the trunk",
    )

    @model_validator(mode="after")
    def _window_ascends(self) -> Self:
        low, high = self.window_hu
        if low >= high:
            raise ValueError(f"window_hu must ascend, found [{low}, {high}]")
        return self


class SplitParams(ParamsSection):
    """Stage split: the patients of the test, validation and training sets."""

    salt: str = Field(
        description=(
            "hashed with the patient's name; one hash decides who is in the test set, another one "
            "the fold of everybody else"
        )
    )
    test_fraction: Fraction = Field(
        description="share of hash values of the test set; about this share of the patients",
    )
    test_patients: tuple[str, ...] = Field(
        default=(),
        description=(
            "patients of the test set, for example of a published split; if given, no hash is used"
        ),
    )
    folds: int = Field(ge=2, description="folds into which the other patients are divided")
    val_fold: int = Field(
        ge=0,
        description="fold that validates, counted from 0; the others train",
    )
    rotate: bool = Field(
        default=False,
        description=(
            "cross-validation: the training with seed s validates on fold val_fold + s, counted "
            "round all folds; with the seeds 0 to folds - 1 each patient outside the test set "
            "validates once. false: all trainings validate on val_fold"
        ),
    )

    def validation_fold(self, seed: int) -> int:
        """Return the fold on which the training with a seed validates."""
        return (self.val_fold + seed) % self.folds if self.rotate else self.val_fold

    @model_validator(mode="after")
    def _val_fold_exists(self) -> Self:
        if self.val_fold >= self.folds:
            raise ValueError(
                f"val_fold {self.val_fold} is none of the {self.folds} folds, which are 0 to "
                f"{self.folds - 1}"
            )
        return self


class Recipe(ParamsSection):
    """Architecture and loss of one network; None keeps the choice of its paper."""

    architecture: str = Field(description="name of the network, as `fullscale networks` lists it")
    encoder: str = Field(default="plain", description="plain or resnet101")
    deep_supervision: bool | None = Field(
        default=None,
        description="supervise every decoder level; null keeps the choice of the network's paper",
    )
    cgm: bool | None = Field(
        default=None,
        description="add the slice classifier (CGM); null keeps the choice of the network's paper",
    )
    loss_terms: tuple[Literal["focal", "ms_ssim", "iou"], ...] = Field(
        min_length=1,
        description="terms of the segmentation loss; they are added",
    )


class AugmentParams(ParamsSection):
    """Strengths of random changes to training slices; 0 switches one off."""

    rotation_deg: float = Field(ge=0, le=180, description="largest rotation")
    scale_fraction: float = Field(ge=0, lt=1, description="largest change of size")
    shift_fraction: float = Field(
        ge=0,
        lt=1,
        description="largest shift, as a share of width and of height",
    )
    elastic_fraction: float = Field(
        ge=0,
        le=0.12,
        description=(
            "largest elastic displacement, as a share of the shorter side; above 0.12 the "
            "deformation may fold"
        ),
    )
    flip_probability: float = Field(
        ge=0,
        le=1,
        description="probability of a flip of left and right; 0 suits organs, which have a side",
    )
    noise_hu: float = Field(ge=0, description="standard deviation of the noise")
    blur_px: float = Field(ge=0, le=5, description="largest sigma of the Gaussian blur")
    contrast_fraction: float = Field(ge=0, lt=1, description="largest change of contrast")


class TrainParams(ParamsSection):
    """Stage train: the same budget, optimiser and augmentation for every network."""

    width: Positive = Field(description="channels of the first level; the paper has 64")
    num_epochs: Positive = Field(description="epochs, each of slices_per_epoch slices")
    sampling: Literal["case", "slice"] = Field(
        default="case",
        description="what has equal weight in an epoch: each case, or each slice",
    )
    slices_per_epoch: Positive | Literal["auto"] = Field(
        default="auto",
        description=(
            "slices in an epoch; auto takes as many as the training cases would have at a common "
            "spacing, or, with sampling slice, as many as they have"
        ),
    )
    batch_size: Positive | Literal["auto"] = Field(
        description=(
            "slices in an optimiser step, over all processes; auto takes the largest power "
            "of two that memory holds"
        ),
    )
    num_accumulated: Positive = Field(
        default=1,
        description="parts of a step that a process computes one after the other, to save memory",
    )
    optimizer: Literal["adamw", "sgd"] = Field(
        description="AdamW, or SGD with Nesterov momentum 0.9",
    )
    learning_rate: float = Field(gt=0, description="learning rate of the first step")
    weight_decay: float = Field(ge=0, description="weight decay of every step")
    schedule: Literal["constant", "cosine", "poly"] = Field(
        description="how the learning rate falls to 0: not at all, as a cosine, or as (1 - t)^0.9",
    )
    gradient_clip_norm: float = Field(
        gt=0,
        description="gradients with a larger norm are scaled down to it",
    )
    ema_decay: float = Field(
        default=0,
        ge=0,
        lt=1,
        description=(
            "decay of the moving average of the weights, and of the means and variances of batch "
            "norms, that is then validated and kept; 0 means none"
        ),
    )
    side_weights: Literal["equal", "halving"] = Field(
        default="equal",
        description=(
            "weights of the side outputs of deep supervision in the loss: equal, or halving, each "
            "coarser one half of the one before; their sum is 1"
        ),
    )
    organ_free_share: float = Field(
        default=0.25,
        ge=0,
        lt=1,
        description=(
            "wanted share of slices without any organ in an epoch; rare ones are used repeatedly"
        ),
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        default="auto",
        description="auto is bf16 autocast on a GPU that has it, else fp32",
    )
    compile: bool = Field(default=False, description="build the network with torch.compile")
    deterministic: bool = Field(
        default=False,
        description=(
            "compute the same bits each time on a GPU too; an operation that cannot is an error"
        ),
    )
    cpu_kernels: CpuKernels = Field(
        default="native",
        description=(
            "arithmetic of stages train and evaluate on a CPU: avx2 gives the same bits on every "
            "x86-64 machine with the same num_threads, native is the fastest of each"
        ),
    )
    num_threads: Positive | None = Field(
        default=None,
        description=(
            "CPU threads of stages train and evaluate; another number changes the last digits; "
            "null takes one for each core"
        ),
    )
    devices: Positive = Field(default=1, description="processes on each machine, one for each GPU")
    num_nodes: Positive = Field(default=1, description="machines")
    strategy: Literal["auto", "ddp"] = Field(
        default="auto",
        description="ddp for several processes",
    )
    num_picture_slices: int = Field(ge=0, description="slices in each picture that goes to MLflow")
    augment: AugmentParams = Field(description="strengths of random changes to training slices")

    @field_validator("batch_size", "slices_per_epoch", mode="before")
    @classmethod
    def _number_or_auto(cls, value: object) -> object:
        if value == "auto" or (type(value) is int and value >= 1):
            return value
        raise ValueError("must be a whole number of at least 1, or auto")

    @model_validator(mode="after")
    def _processes_need_a_strategy(self) -> Self:
        if self.devices * self.num_nodes > 1 and self.strategy != "ddp":
            raise ValueError(
                f"{self.devices} devices on {self.num_nodes} nodes need strategy ddp, "
                f"found {self.strategy!r}"
            )
        return self


class EvaluateParams(ParamsSection):
    """Stage evaluate: from probabilities to masks and scores."""

    batch_size: Positive = Field(description="slices computed at a time")
    threshold: Fraction = Field(description="probability from which a voxel belongs to an organ")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        default="auto",
        description=(
            "auto is bf16 where GPU or processor compute in it natively, else fp32; fp32 gives "
            "the same scores on every machine"
        ),
    )
    min_false_positive_mm2: float = Field(
        gt=0,
        description=(
            "area of predicted pixels from which an organ-free slice counts as false positive, in "
            "mm2"
        ),
    )
    gate: Literal["hard", "slab", "soft", "none"] = Field(
        default="hard",
        description=(
            "how the slice classifier (CGM) acts in evaluation and in a registered version: hard "
            "empties slices in which it does not find the organ, as in the paper; slab only those "
            "in whose neighbours within slice.neighbour_mm, at least the next slices, it does not "
            "find it either; soft multiplies by its probability; none ignores it; training "
            "validates with hard"
        ),
    )
    refine: Literal["none", "largest_component", "crf"] = Field(
        default="none",
        description=(
            "how masks are refined in evaluation and in a registered version: largest_component "
            "keeps the largest connected part of each organ in 3D; crf fits the edges in each "
            "slice to the image by a fully connected random field"
        ),
    )
    largest_component: bool = Field(
        default=False,
        description="also score the largest component of each organ",
    )
    ablate_slice_classifier: bool = Field(
        default=False,
        description=(
            "also score the same predictions with every other gate of the slice classifier (CGM)"
        ),
    )


class RegisterParams(ParamsSection):
    """Stage register: the promotion gate, and the name of the registered model."""

    model_name: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="name of the registered model")
    candidate: str = Field(description="network that may be promoted")
    baseline: str = Field(description="network that the candidate must beat")
    deploy: Literal["ensemble", "best"] = Field(
        default="ensemble",
        description=(
            "what is registered of several trainings (seeds): ensemble, the mean of their "
            "probabilities, or best, the one with the highest validation Dice"
        ),
    )
    min_dice_gain: float = Field(
        gt=-1,
        lt=1,
        description=(
            "the lower bound of the gain in Dice over the baseline must lie above this: 0 asks for "
            "a better network, -0.01 for one that is not worse by 0.01"
        ),
    )
    confidence: Fraction = Field(
        description=(
            "confidence of all two-sided intervals; each test of the promotion gate is one-sided "
            "at half of the rest, so 0.95 gives 2.5 %"
        ),
    )
    num_bootstrap: int = Field(
        ge=100, description="bootstrap samples of an interval of one network's scores"
    )
    max_slice_fpr: Share = Field(
        description=(
            "largest slice FPR of an organ, and largest share of organ-free patients in whom it "
            "is seen"
        ),
    )
    max_organ_dice_loss: Share = Field(
        description="loss in Dice against the baseline that the bound of each organ must exclude",
    )
    min_patients: Positive = Field(
        default=6,
        description=(
            "smallest number of test patients of each organ, below which there is no verdict; "
            "2.5 % cannot be reached with fewer than 6"
        ),
    )
    failure_dice: Share = Field(
        default=0.5,
        description=(
            "Dice below which an organ of a patient has failed; a failure that the baseline or "
            "the champion does not have is a FAIL"
        ),
    )
    min_organ_dice: Share | dict[str, Share] = Field(
        default=0.5,
        description="smallest mean Dice: a number for all organs, or one for each organ by name",
    )
    champion_margin: Share = Field(
        default=0.02,
        description=(
            "loss in Dice against the champion that the bounds of the mean and of each organ must "
            "exclude"
        ),
    )
    seed: int = Field(description="random seed of the bootstrap and of drawn sign vectors")

    @field_validator("min_organ_dice", mode="before")
    @classmethod
    def _share_or_shares(cls, value: object) -> object:
        floors = value.values() if isinstance(value, dict) else [value]
        if all(isinstance(floor, int | float) and 0 <= floor <= 1 for floor in floors):
            return value
        raise ValueError("must be a number from 0 to 1, or one for each organ by name")

    def organ_floor(self, organ: str) -> float:
        """Return the smallest mean Dice of an organ that passes."""
        floors = self.min_organ_dice
        return floors[organ] if isinstance(floors, dict) else floors

    @model_validator(mode="after")
    def _two_networks(self) -> Self:
        if self.candidate == self.baseline:
            raise ValueError(f"candidate and baseline are both {self.baseline!r}")
        return self


class Params(ParamsSection):
    """The whole params.yaml."""

    organs: dict[str, tuple[Label, ...]] = Field(
        min_length=1,
        description=(
            "labels of each organ by their names in data/dataset.json: the organ itself first, "
            "then its parts, such as tumours; a number is taken only where its label has that name"
        ),
    )
    networks: tuple[str, ...] = Field(
        min_length=1,
        description="networks to train and evaluate; each needs a recipe",
    )
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        min_length=1,
        description=(
            "random seeds of weights, order, augmentation and dropout: each network is trained "
            "once with each of them; adding one leaves the others' trainings as they are"
        ),
    )
    recipes: dict[str, Recipe] = Field(description="how each network is built, by name")
    compute: ComputeParams = ComputeParams()
    slice: SliceParams
    split: SplitParams
    train: TrainParams
    evaluate: EvaluateParams
    register_: RegisterParams = Field(alias="register")

    @model_validator(mode="after")
    def _organs_share_no_label(self) -> Self:
        owner: dict[int | str, str] = {}
        for organ, labels in self.organs.items():
            if not labels:
                raise ValueError(f"organs.{organ} names no label")
            for label in labels:
                if label in owner:
                    raise ValueError(
                        f"label {label!r} is given to both organs.{owner[label]} "
                        f"and organs.{organ}; a voxel can be one organ only"
                    )
                owner[label] = organ
        return self

    @property
    def label_ids(self) -> dict[str, tuple[int, ...]]:
        """Label ids of each organ.

        Raises:
            StageError: an organ still has names, which only the cohort can resolve.
        """
        if named := [o for o, labels in self.organs.items() if any(type(x) is str for x in labels)]:
            raise StageError(f"the labels of {', '.join(named)} have no ids without a cohort")
        return {organ: tuple(map(int, labels)) for organ, labels in self.organs.items()}

    @model_validator(mode="after")
    def _every_organ_has_a_floor(self) -> Self:
        floors = self.register_.min_organ_dice
        if isinstance(floors, dict) and set(floors) != set(self.organs):
            raise ValueError(
                f"register.min_organ_dice names {sorted(floors)}; wanted one number, or one for "
                f"each of the organs {sorted(self.organs)}"
            )
        return self

    @model_validator(mode="after")
    def _trainings_are_comparable(self) -> Self:
        if self.split.rotate and self.register_.deploy == "best":
            raise ValueError(
                "with split.rotate the trainings validate on different patients, so their "
                "validation Dice does not tell which is best: set register.deploy to ensemble"
            )
        return self

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) != len(seeds):
            raise ValueError("names one twice")
        return seeds

    @model_validator(mode="after")
    def _networks_have_recipes(self) -> Self:
        if len(set(self.networks)) != len(self.networks):
            raise ValueError(f"networks names one twice: {list(self.networks)}")
        for network in self.networks:
            if network not in self.recipes:
                raise ValueError(
                    f"networks names {network!r}, but recipes holds only {sorted(self.recipes)}"
                )
        for role in ("candidate", "baseline"):
            name = getattr(self.register_, role)
            if name not in self.networks:
                raise ValueError(
                    f"register.{role} is {name!r}, which is not trained: "
                    f"networks is {list(self.networks)}"
                )
        return self


def load_params(*paths: Path) -> Params:
    """Read and check a params.yaml, or the files among which its sections are divided.

    Raises:
        StageError: a file is missing, is no YAML mapping, or breaks a rule, or two files have the
            same section; the message names each offending key and what it wants.
    """
    content: dict[str, Any] = {}
    for path in paths:
        sections = _read_sections(path)
        if twice := sorted(set(sections) & set(content)):
            raise StageError(f"{path} has {', '.join(twice)}, and so has another file: keep one")
        content |= sections
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        names = " and ".join(str(path) for path in paths)
        raise StageError(f"{names}: {_explain(error)}") from None


def _read_sections(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError(
            f"{path} is missing; run from the project's root, or restore it with "
            f"`git checkout {path.name}`"
        ) from None
    except yaml.YAMLError as error:
        raise StageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise StageError(f"{path} must hold a mapping of sections, found {type(content).__name__}")
    return content


def _explain(error: ValidationError) -> str:
    lines = []
    for detail in error.errors():
        key = ".".join(str(part) for part in detail["loc"])
        message = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            message = OLD_KEYS.get(key, "unknown key; remove it or correct its spelling")
        elif detail["type"] == "missing":
            message = "is missing"
        elif not isinstance(detail["input"], dict | BaseModel):
            message += f", found {detail['input']!r}"
        lines.append(f"{key}: {message}" if key else message)
    return "; ".join(lines)
