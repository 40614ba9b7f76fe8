"""params.yaml as frozen models: unknown keys and impossible combinations are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fullscale.runtime.errors import StageError

Fraction = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A part of params.yaml: immutable, and closed to keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ComputeParams(Section):
    """Where work runs and how often it is secured; changes no result."""

    backend: Literal["local", "dask"] = "local"
    address: str | None = None
    num_workers: int = Field(default=0, ge=0, description="0 uses every core")
    num_loader_workers: int | None = Field(
        default=None, ge=0, description="None: none on a CPU, up to 8 a process beside a GPU"
    )
    checkpoint_interval_s: float = Field(default=60, ge=0)

    @model_validator(mode="after")
    def _dask_needs_address(self) -> Self:
        if self.backend == "dask" and not self.address:
            raise ValueError(
                "backend dask needs the address of a scheduler, such as tcp://host:8786"
            )
        return self


class SliceParams(Section):
    """Stage slice: from scans to square, windowed slices."""

    size_px: int = Field(ge=32, le=1024)
    window_hu: tuple[float, float]
    body_threshold_hu: float
    body_margin_mm: float = Field(ge=0)

    @model_validator(mode="after")
    def _window_ascends(self) -> Self:
        low, high = self.window_hu
        if low >= high:
            raise ValueError(f"window_hu must ascend, found [{low}, {high}]")
        return self


class SplitParams(Section):
    """Stage split: who is tested, validated on and trained on."""

    salt: str
    test_fraction: Fraction
    test_patients: tuple[str, ...] = ()
    val_fraction: Fraction
    seed: int


class Recipe(Section):
    """How one network is built and what it is trained on; None keeps its paper's choice."""

    architecture: str
    encoder: str = "plain"
    deep_supervision: bool | None = None
    cgm: bool | None = None
    loss_terms: tuple[Literal["focal", "ms_ssim", "iou"], ...] = Field(min_length=1)


class AugmentParams(Section):
    """Strengths of random changes to training slices; 0 switches one off."""

    rotation_deg: float = Field(ge=0, le=180)
    scale_fraction: float = Field(ge=0, lt=1)
    shift_fraction: float = Field(ge=0, lt=1, description="of width and of height")
    elastic_fraction: float = Field(
        ge=0, le=0.12, description="largest bend, of the shorter side; beyond 0.12 it may fold"
    )
    flip_probability: float = Field(ge=0, le=1, description="left and right; organs have sides")
    noise_hu: float = Field(ge=0, description="standard deviation")
    blur_px: float = Field(ge=0, le=5, description="largest sigma")
    contrast_fraction: float = Field(ge=0, lt=1)


class TrainParams(Section):
    """Stage train: the same budget, optimiser and augmentation for every network.

    Attributes:
        seed: of all that is random.
        width: channels of the first level.
        num_epochs: passes over the training slices.
        batch_size: slices in an optimiser step, over all processes; "auto" takes what memory holds.
        num_accumulated: parts of a step that a process computes one after the other, to save
            memory.
        optimizer, learning_rate, weight_decay: of every step; SGD has Nesterov momentum 0.9.
        schedule: how the learning rate falls to 0: not at all, as a cosine, or as
            (1 - t)^0.9.
        gradient_clip_norm: longest gradient of a step.
        ema_decay: of an exponential moving average of the weights, which is then what is
            validated and kept; 0 = none.
        organ_free_share: share of the slices without any organ that an epoch uses, others each
            time; above 1 some are used again.
        precision: "auto" is bf16 autocast on a GPU that has it, else fp32.
        compile: whether torch.compile builds the network.
        deterministic: whether a GPU must compute the same bits each time; an operation that cannot
            is an error. A CPU always does.
        devices, num_nodes, strategy: processes on each machine, machines, and how they share work.
        num_picture_slices: slices in each picture that is tracked.
        augment: strengths of random changes.
    """

    seed: int = Field(ge=0)
    width: Positive
    num_epochs: Positive
    batch_size: Positive | Literal["auto"]
    num_accumulated: Positive = 1
    optimizer: Literal["adamw", "sgd"]
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    schedule: Literal["constant", "cosine", "poly"]
    gradient_clip_norm: float = Field(gt=0)
    ema_decay: float = Field(default=0, ge=0, lt=1)
    organ_free_share: float = Field(default=1, ge=0)
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = False
    deterministic: bool = False
    devices: Positive = 1
    num_nodes: Positive = 1
    strategy: Literal["auto", "ddp"] = "auto"
    num_picture_slices: int = Field(ge=0)
    augment: AugmentParams

    @field_validator("batch_size", mode="before")
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


class EvaluateParams(Section):
    """Stage evaluate: from probabilities to masks and scores."""

    batch_size: Positive
    threshold: Fraction
    min_false_positive_px: Positive
    largest_component: bool = False
    ablate_gate: bool = False


class RegisterParams(Section):
    """Stage register: what a candidate must show before people may promote it."""

    model_name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    candidate: str
    baseline: str
    min_dice_gain: float = Field(ge=0, lt=1)
    confidence: Fraction
    num_bootstrap: int = Field(ge=100)
    max_slice_fpr: float = Field(ge=0, le=1)
    max_organ_dice_loss: float = Field(ge=0, le=1)
    min_cases: int = Field(ge=2)
    seed: int

    @model_validator(mode="after")
    def _two_networks(self) -> Self:
        if self.candidate == self.baseline:
            raise ValueError(f"candidate and baseline are both {self.baseline!r}")
        return self


class Params(Section):
    """All of params.yaml."""

    organs: dict[str, tuple[Positive, ...]] = Field(min_length=1)
    networks: tuple[str, ...] = Field(min_length=1)
    recipes: dict[str, Recipe]
    compute: ComputeParams = ComputeParams()
    slice: SliceParams
    split: SplitParams
    train: TrainParams
    evaluate: EvaluateParams
    register_: RegisterParams = Field(alias="register")

    @model_validator(mode="after")
    def _organs_share_no_label(self) -> Self:
        owner: dict[int, str] = {}
        for organ, label_ids in self.organs.items():
            if not label_ids:
                raise ValueError(f"organs.{organ} names no label id")
            for label_id in label_ids:
                if label_id in owner:
                    raise ValueError(
                        f"label id {label_id} is given to both organs.{owner[label_id]} "
                        f"and organs.{organ}; a voxel can be one organ only"
                    )
                owner[label_id] = organ
        return self

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
        raise StageError(f"{names}: {_describe(error)}") from None


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


def _describe(error: ValidationError) -> str:
    lines = []
    for detail in error.errors():
        key = ".".join(str(part) for part in detail["loc"])
        message = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            message = "unknown key; remove it or correct its spelling"
        elif detail["type"] == "missing":
            message = "is missing"
        elif not isinstance(detail["input"], dict | BaseModel):
            message += f", found {detail['input']!r}"
        lines.append(f"{key}: {message}" if key else message)
    return "; ".join(lines)
