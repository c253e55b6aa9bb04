"""The job spec: what a person writes in `job.yaml`. Unknown keys are refused; `fusion.spec_file` adds file and line.

The reference page in `docs/` is generated from these models, so every field carries a description.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from fusion.codec_names import CODEC_OPTIONS, read_codec
from fusion.plan import ScheduleName
from fusion.units import Seconds, SomeBytes, Within, parse_seconds
from fusion.yaml_file import Section as _Section


def _countable(number: int) -> int:
    if number > _MOST:
        raise ValueError(f"input should be at most {_MOST:,}")
    return number


_MOST = 10**12
Count = Annotated[int, AfterValidator(_countable)]
"""Of steps, samples or tokens: no more than records and messages have room for."""
_MOST_MICRO_BATCHES = 2**14
"""Each has its tasks, which schedules list one by one."""


class ModelFromEntrypoint(_Section):
    entrypoint: str = Field(
        description="`file.py:function` or `package.module:function`; the function returns the model."
    )
    args: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the function.")


class ModelFromTransformers(_Section):
    hf: str = Field(
        description="Model type in `transformers`, e.g. `gpt2`; the model is made from a config, not downloaded."
    )
    config: dict[str, Any] = Field(default_factory=dict, description="Overrides of that model type's default config.")


class LossFromEntrypoint(_Section):
    entrypoint: str = Field(description="`file.py:function`; called as `loss(output, targets)`, returns a scalar.")


class TextData(_Section):
    text: str = Field(description="A UTF-8 text file. Targets are the next tokens.")
    tokenizer: str = Field("bytes", description="`bytes`, or the path of a `tokenizers` JSON file.")
    sequence_length: Count = Field(128, gt=0, description="Tokens per sample.")
    holdout: float = Field(
        0.1, ge=0, lt=1, description="Share at the end kept for evaluation; used only with `eval_every`."
    )


class ArraysData(_Section):
    arrays: str | dict[str, str] = Field(
        description="An `.npz` file, or a mapping from key to `.npy` file. Keys are `inputs` and `targets`, or the names "
        "of `forward`'s arguments; the first axis is the sample."
    )
    holdout: float = Field(
        0.1, ge=0, lt=1, description="Share at the end kept for evaluation; used only with `eval_every`."
    )


class EntrypointData(_Section):
    entrypoint: str = Field(description="`file.py:function`; returns a torch `Dataset` or an iterable of samples.")
    args: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the function.")
    limit: int | None = Field(None, gt=0, description="Take at most this many samples.")
    holdout: float = Field(
        0.1, ge=0, lt=1, description="Share at the end kept for evaluation; used only with `eval_every`."
    )


class HuggingFaceData(_Section):
    hf: str = Field(description="A dataset name or local path for `datasets.load_dataset` (extra `hf`).")
    config: str | None = Field(None, description="The dataset's configuration name.")
    split: str = Field("train", description="Split to train on.")
    column: str = Field("text", description="Text column.")
    tokenizer: str = Field("bytes", description="`bytes`, or the path of a `tokenizers` JSON file.")
    sequence_length: Count = Field(128, gt=0, description="Tokens per sample.")
    limit: int | None = Field(None, gt=0, description="Take at most this many rows.")
    holdout: float = Field(
        0.1, ge=0, lt=1, description="Share at the end kept for evaluation; used only with `eval_every`."
    )


def _variant(options: dict[str, str]) -> Any:
    """Chooses a union member by the key that only it has, so that errors speak of one member only."""

    def choose(value: Any) -> str | None:
        if isinstance(value, BaseModel):
            return next((tag for key, tag in options.items() if key in type(value).model_fields), None)
        if isinstance(value, dict):
            return next((tag for key, tag in options.items() if key in value), None)
        return "name" if isinstance(value, str) and "name" in options.values() else None

    return Discriminator(
        choose,
        custom_error_type="which",
        custom_error_message="needs exactly one of these keys: " + ", ".join(options),
    )


ModelSpec = Annotated[
    Annotated[ModelFromEntrypoint, Tag("entrypoint")] | Annotated[ModelFromTransformers, Tag("hf")],
    _variant({"entrypoint": "entrypoint", "hf": "hf"}),
]
LossName = Literal["cross_entropy", "mse", "model"]
LossSpec = Annotated[
    Annotated[LossName, Tag("name")] | Annotated[LossFromEntrypoint, Tag("entrypoint")],
    _variant({"entrypoint": "entrypoint", "cross_entropy | mse | model (a plain word)": "name"}),
]
DataSpec = Annotated[
    Annotated[TextData, Tag("text")]
    | Annotated[ArraysData, Tag("arrays")]
    | Annotated[EntrypointData, Tag("entrypoint")]
    | Annotated[HuggingFaceData, Tag("hf")],
    _variant({"text": "text", "arrays": "arrays", "entrypoint": "entrypoint", "hf": "hf"}),
]


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSpec(_Section):
    """Options that are left out take torch's defaults for that optimiser."""

    name: Literal["sgd", "adam", "adamw", "adagrad", "muon"] = Field(
        "adamw",
        description="torch.optim's optimiser. Muon takes the 2-D parameters; with `muon`, all others go to AdamW at the same rate.",
    )
    lr: float = Field(1e-3, gt=0, allow_inf_nan=False, description="Peak learning rate.")
    weight_decay: float | None = Field(None, ge=0, allow_inf_nan=False, description="Weight decay.")
    momentum: float | None = Field(None, ge=0, lt=1, description="SGD and Muon.")
    nesterov: bool | None = Field(None, description="SGD and Muon.")
    betas: tuple[Beta, Beta] | None = Field(None, description="Adam and AdamW.")
    eps: float | None = Field(None, gt=0, allow_inf_nan=False, description="Adam, AdamW and Adagrad.")
    lr_decay: float | None = Field(None, ge=0, allow_inf_nan=False, description="Adagrad.")

    @model_validator(mode="after")
    def _options_belong_to_the_optimizer(self) -> Self:
        takes = {
            "sgd": {"momentum", "nesterov"},
            "adam": {"betas", "eps"},
            "adamw": {"betas", "eps"},
            "adagrad": {"eps", "lr_decay"},
            "muon": {"momentum", "nesterov"},
        }[self.name]
        for option in ("momentum", "nesterov", "betas", "eps", "lr_decay"):
            if getattr(self, option) is not None and option not in takes:
                raise ValueError(
                    f"{self.name} has no option {option}; it takes lr, weight_decay, {', '.join(sorted(takes))}"
                )
        # Left out, SGD's is none.
        if self.nesterov and not (self.momentum or (self.momentum is None and self.name == "muon")):
            raise ValueError("nesterov needs a momentum above 0; give one, e.g. momentum: 0.9")
        return self

    @property
    def slots(self) -> int:
        """Tensors of a parameter's size that the optimiser keeps for it; with `muon`, for a matrix."""
        if self.name == "sgd":
            return 1 if self.momentum else 0
        return {"adam": 2, "adamw": 2, "adagrad": 1, "muon": 1}[self.name]


class LrScheduleSpec(_Section):
    """Factor on the learning rate at step s (from 0) of S; see `executor.learning_rate` for the formulas."""

    name: Literal["constant", "linear", "cosine", "step"] = Field("constant", description="Shape after the warm-up.")
    warmup: Count = Field(0, ge=0, description="Steps of linear warm-up: factor (s + 1) / warmup.")
    final: float = Field(0.0, ge=0, le=1, description="Factor at the end, for linear and cosine.")
    every: Count = Field(100, gt=0, description="Steps between drops, for step.")
    gamma: float = Field(0.1, gt=0, le=1, description="Factor of each drop, for step.")

    @property
    def unused(self) -> tuple[str, ...]:
        """Options that were given but say nothing of a schedule of this shape."""
        used = {"linear": ("final",), "cosine": ("final",), "step": ("every", "gamma")}.get(self.name, ())
        fields = type(self).model_fields
        others = (option for option in ("final", "every", "gamma") if option not in used)
        return tuple(option for option in others if getattr(self, option) != fields[option].default)


class TrainSpec(_Section):
    steps: Count = Field(gt=0, description="Optimiser updates.")
    global_batch: Count = Field(gt=0, description="Samples per step.")
    micro_batch: int | None = Field(
        None, gt=0, description="Samples per micro-batch; must divide global_batch. Default: all."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seeds data order, dropout and stochastic rounding.")
    optimizer: OptimizerSpec = Field(default_factory=OptimizerSpec)
    lr_schedule: LrScheduleSpec = Field(default_factory=LrScheduleSpec)
    clip_grad_norm: float | None = Field(None, gt=0, description="Clip gradients to this global L2 norm.")
    eval_every: Count | None = Field(
        None, gt=0, description="Evaluate on the held-out split after every so many steps."
    )
    eval_batches: Count = Field(8, gt=0, description="Micro-batches per evaluation at most.")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16 traces the model under autocast."
    )
    recompute: bool = Field(False, description="Recompute activations in backward instead of keeping them.")

    @model_validator(mode="after")
    def _micro_batches_fill_the_batch(self) -> Self:
        if self.micro_batch and self.global_batch % self.micro_batch:
            raise ValueError(f"micro_batch {self.micro_batch} does not divide global_batch {self.global_batch}")
        if self.micro_batches > _MOST_MICRO_BATCHES:
            raise ValueError(
                f"{self.micro_batches:,} micro-batches of {self.micro_batch_size} in a step; a step has "
                f"{_MOST_MICRO_BATCHES:,} at most: make micro_batch larger, or global_batch smaller"
            )
        return self

    @property
    def micro_batch_size(self) -> int:
        return self.micro_batch or self.global_batch

    @property
    def micro_batches(self) -> int:
        return self.global_batch // self.micro_batch_size


class PlanSpec(_Section):
    policy: Literal["op-fence", "equal-ops", "equal-compute", "random"] = Field(
        "op-fence", description="How to cut and place."
    )
    schedule: ScheduleName = Field("1f1b", description="Order of the tasks of a fragment.")
    workers: int | None = Field(
        None,
        gt=0,
        description="Workers to wait for and use: of those that are idle, the fastest together. Default: all that are.",
    )
    fragments: int | None = Field(None, gt=0, description="Fragments to cut. Default: the policy decides.")


def _direction(*known: str) -> AfterValidator:
    def check(name: str) -> str:
        base = name.partition(":")[0]
        if base in ("adatopk", "adaint", "auto"):
            raise ValueError(f"{base} chooses a codec for each link and is no codec itself; write `codec: {base}`")
        if base == "topk-reused" and base not in known:
            raise ValueError(f"topk-reused is a codec of gradients (backward) only; known: {', '.join(known)}")
        read_codec(name, known)
        return name

    return AfterValidator(check)


ForwardCodec = Annotated[str, _direction(*(name for name in CODEC_OPTIONS if name != "topk-reused"))]
BackwardCodec = Annotated[str, _direction(*CODEC_OPTIONS)]


class CompressionSpec(_Section):
    codec: Literal[
        "none", "bf16", "int8", "int4", "int3", "int2", "topk", "topk-sampled", "adatopk", "adaint", "auto"
    ] = Field("none", description="Codec of crossing edges.")
    forward: ForwardCodec | None = Field(
        None,
        description="Codec of activations in place of `codec`, with its options if need be: `int4:stochastic=1,block=256` (int8 to "
        "int2; blocks are multiples of 8 up to 65536), `topk:ratio=100,value_bits=8` (8, 16 or 32).",
    )
    backward: BackwardCodec | None = Field(
        None,
        description="Codec of gradients in place of `codec`, likewise. `topk-reused`: the values at the places that the "
        "activation's top-k kept, without sending the places again; what codecs topk, topk-sampled and adatopk do if nothing is "
        "said here. `topk`: the largest gradients instead, with the ratio of `codec`, as in the paper, which costs far more of the "
        "loss.",
    )
    error_feedback: bool = Field(
        False, description="Add what a codec lost of one micro-batch to the next one, on every edge with a lossy codec."
    )
    ratio: float = Field(
        100.0,
        ge=1,
        le=1e12,
        allow_inf_nan=False,
        description="Ratio of topk and adatopk: keep one value in `ratio`; adaint: how many times fewer bytes on the slowest "
        "link, as far as the widths allow.",
    )

    @model_validator(mode="after")
    def _there_are_places_to_reuse(self) -> Self:
        base, _, options = (self.backward or "").partition(":")
        if base != "topk-reused":
            return self
        forward = (self.forward or self.codec).partition(":")[0]
        if forward not in ("topk", "topk-sampled", "adatopk"):
            raise ValueError(f"backward topk-reused needs a top-k codec of the activations, not {forward}")
        if "ratio" in options:
            raise ValueError("backward topk-reused has the activations' ratio: leave its own out")
        return self


class FaultToleranceSpec(_Section):
    failure_timeout: Annotated[Seconds, Within(parse_seconds, "1ms", "24h")] = Field(
        5.0, description="Silence after which a worker counts as lost."
    )
    backup_every: Literal["auto"] | Annotated[Count, Field(gt=0)] = Field(
        "auto",
        description="Steps between snapshots that backup workers hold, 1 or more; `auto`: as often as costs little.",
    )
    log_memory: SomeBytes = Field(
        256 * 2**20,
        description="What a worker keeps for replay at most; a full log waits for the next snapshot. After a loss, until that "
        "snapshot, an adopter keeps as much again for the lost worker.",
    )

    @field_validator("backup_every", mode="wrap")
    @classmethod
    def _one_message_for_both_forms(cls, value: Any, read: ValidatorFunctionWrapHandler) -> Any:
        try:
            return read(value)
        except ValidationError:
            raise PydanticCustomError("backup_every", "expected 'auto' or a whole number of 1 or more") from None


class VerifySpec(_Section):
    fraction: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the tasks that another worker runs again, drawn at random, to find workers that cheat; 0: none. "
        "Above 0, losses and checkpoints are given out once their steps are past the check.",
    )


class CheckpointSpec(_Section):
    every: Count | None = Field(None, gt=0, description="Steps between checkpoints. One is always written at the end.")
    keep: int = Field(3, gt=0, description="Checkpoints to keep.")


NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class JobSpec(_Section):
    """One training job."""

    name: str = Field("job", pattern=NAME_PATTERN, description="A name for people.")
    model: ModelSpec = Field(description="The model.")
    loss: LossSpec = Field(
        "model", description="`cross_entropy`, `mse`, an entrypoint, or `model` when forward returns the loss."
    )
    data: DataSpec = Field(description="The data.")
    train: TrainSpec = Field(description="How to train.")
    plan: PlanSpec = Field(default_factory=PlanSpec, description="How to cut and place.")
    compression: CompressionSpec = Field(default_factory=CompressionSpec, description="What crosses a link.")
    fault_tolerance: FaultToleranceSpec = Field(default_factory=FaultToleranceSpec, description="When a device leaves.")
    verify: VerifySpec = Field(default_factory=VerifySpec, description="Spot checks of what workers compute.")
    checkpoint: CheckpointSpec = Field(default_factory=CheckpointSpec, description="Checkpoints.")
