"""What the user asked for: the config file as checked, frozen pydantic models.

Reading a spec imports neither torch nor transformers, so that `--help` and a config error answer at once.
`dist_finetune.spec_file` reads YAML and overrides into these models and words the errors.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, field_validator

from dist_finetune.durations import parse_bytes, parse_interval
from dist_finetune.errors import UserError, did_you_mean
from dist_finetune.spec_base import AutoOrPositive, DurationS, PositiveInt, Section, StringList
from dist_finetune.spec_base import empty_section as _section
from dist_finetune.spec_features import FeaturesSpec
from dist_finetune.spec_launch import CloudSpec, SlurmSpec
from dist_finetune.tasks.names import TaskName

Strategy = Literal["ddp", "zero1", "zero2", "zero3", "fsdp"]
SHARDED_WEIGHTS: tuple[Strategy, ...] = ("zero3", "fsdp")
"""Strategies under which a device holds a share of the weights, and gathers a module's when it is called."""
# Of the 255 that file systems take; commands add to it, as in NAME-features and NAME.20250101-120000-2.
MAX_NAME_BYTES = 200
FREEZE_WORDS = ("none", "backbone", "norms", "bias-only", "all-but-last N")


def _as_layers(value: Any) -> Any:
    """`layers: 3` and `layers: [1, 2]` mean the same as their string forms."""
    if isinstance(value, int):
        return str(value)
    if isinstance(value, (list, tuple)):
        return ",".join(str(v) for v in value)
    return value


def _fraction_or_sources(value: Any) -> Any:
    """One check for both forms of `data.validation`, so that a wrong value is one problem and not one for each form."""
    if isinstance(value, (int, float)):
        if not 0 < value < 1:
            raise ValueError(f"{value} is no fraction of the training data; it must lie between 0 and 1, such as 0.1")
        return float(value)
    if isinstance(value, str) and re.fullmatch(r"[\d.]+\s*%|0?\.\d+", value):
        raise ValueError(f"{value!r} is a text; write the fraction as a number, such as 0.1")
    sources = [value] if isinstance(value, str) else value
    if not isinstance(sources, (list, tuple)) or not sources or not all(isinstance(s, str) for s in sources):
        raise ValueError(f"takes a fraction such as 0.1, or files or a data set as data.train does (got {value!r})")
    return tuple(sources)


def _whole_steps(warmup: float) -> float:
    if warmup >= 1 and warmup != int(warmup):
        raise ValueError(f"{warmup} is neither a fraction below 1 nor a whole number of steps")
    return warmup


def _cache_section(value: Any) -> Any:
    """`cache: off` is short for `cache: {mode: off}`; YAML 1.1 writers turn on and off into true and false."""
    if isinstance(value, bool):
        return {"mode": "on" if value else "off"}
    return {"mode": value} if isinstance(value, str) else _section(value)


def _freeze_section(value: Any) -> Any:
    """`freeze: backbone` is short for `freeze: {rule: backbone}`."""
    return {"rule": value} if isinstance(value, str) else _section(value)


def _no_true_rate(value: Any) -> Any:
    """As `Section` says of whole keys, for a number inside one."""
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is no learning rate; write a number, such as 1e-4")
    return value


Warmup = Annotated[float, Field(ge=0), AfterValidator(_whole_steps)]
Layers = Annotated[str | None, BeforeValidator(_as_layers, json_schema_input_type=int | str | list[int | str] | None)]
Interval = Annotated[
    tuple[float, Literal["steps", "epochs", "s"]],
    BeforeValidator(parse_interval, json_schema_input_type=float | str | list[float | str]),
]
FractionOrSources = Annotated[
    float | tuple[str, ...], BeforeValidator(_fraction_or_sources, json_schema_input_type=float | str | list[str])
]


class ModelSpec(Section):
    name: str
    """A transformers hub id or local folder, `timm:NAME`, `torchvision:NAME`, `demo:NAME` or `module:function`."""
    weights: str = "pretrained"
    """`pretrained`, `none` (random), or a .safetensors / .pth file of weights."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Dropout probability everywhere in the model; null keeps the model's own. 0.0 makes runs comparable."""
    trust_remote_code: bool = False
    """Run model code that a hub repository ships. Off unless you trust that repository."""


class DataSpec(Section):
    train: StringList
    """Hub id, file(s) .csv .tsv .json .jsonl .parquet .arrow .conll, a folder of class folders, or `builtin:NAME`."""
    validation: FractionOrSources = 0.1
    """The same kinds as `train`, or the fraction of `train` to hold out (stratified, seeded)."""
    test: StringList | None = None
    """Evaluated once, after training."""
    columns: tuple[str, ...] | None = None
    """Names of the columns of .csv / .tsv files that have no header line."""
    text: StringList | None = None
    """Text column, two columns for a pair, or the column of word lists. Found by itself where unambiguous."""
    image: str | None = None
    """Image column. Found by itself where unambiguous."""
    label: StringList | None = None
    """Label column, or several columns of 0 and 1 for a multilabel task. Found by itself where unambiguous."""
    max_rows: PositiveInt | None = None
    """Use only so many training rows (a seeded sample)."""
    max_length: PositiveInt | None = None
    """Tokens a text is cut to; left out: the model's limit, at most 512."""
    image_size: PositiveInt | None = None
    """Pixels a side; left out: what the model was trained on."""
    augment: bool = False
    """Random crops and flips of training images, seeded for each sample."""
    num_workers: Annotated[int, Field(ge=0)] | None = None
    """Loader processes a rank; left out: 0 for text and on the CPU, 8 for images on a GPU."""


class FreezeSpec(Section):
    rule: str = "none"
    """A ready word: none, backbone, norms, bias-only, all-but-last N."""
    embeddings: bool = False
    """Freeze the embeddings of a BERT, the stem of a CNN."""
    layers: Layers = None
    """Block numbers from 0: "1,2,3", "0-5,9", "-1", "first 6", "last 2", "50%", "all"."""
    patterns: StringList = ()
    """Globs over whole dotted segments of parameter names, such as `*.LayerNorm.*`."""
    except_: StringList = Field(default=(), alias="except")
    """Globs that stay trainable; they win over all other rules."""
    mode: Literal["eval", "train"] = "eval"
    """How frozen BatchNorm and dropout behave."""
    dtype: Literal["bf16"] | None = None
    """bf16 keeps frozen matrices and kernels in half the memory; null keeps them in fp32. The exported model has the
    frozen tensors of its source either way."""

    # Code may write FreezeSpec(except_=...), since `except` is a word of Python's own.
    model_config = ConfigDict(**Section.model_config, validate_by_name=True)

    @field_validator("rule")
    @classmethod
    def _ready_word(cls, rule: str) -> str:
        if rule not in FREEZE_WORDS[:-1] and not re.fullmatch(r"all-but-last\s+\d+", rule):
            raise ValueError(f"{rule!r} is no ready word. {did_you_mean(rule, FREEZE_WORDS)}")
        return rule

    def is_none(self) -> bool:
        """True where the section asks for nothing, no `except`, `mode` or `dtype` either."""
        return self == FreezeSpec()


class TrainSpec(Section):
    epochs: Annotated[float, Field(gt=0)] = 3
    """Passes over the training data; a fraction ends inside an epoch."""
    max_steps: PositiveInt | None = None
    """End sooner, after so many optimizer steps; the schedule spans what will really run."""
    global_batch_size: PositiveInt = 32
    """Samples an optimizer step takes over all processes, whose number must divide it; accumulation follows from it."""
    micro_batch_size: AutoOrPositive = "auto"
    """Samples one forward pass takes on one rank. Lower it where memory runs out: the numbers stay the same."""
    eval_batch_size: AutoOrPositive = "auto"
    """Samples one evaluation pass takes on one rank."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of pre-trained weights; left out: 5e-5 for a transformer, 1e-3 for a CNN."""
    head_lr: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the new head; left out: the same as `lr`."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Multiplies `lr` once more for each block further from the head, counted on the full depth."""
    pattern_lr: dict[str, Annotated[float, BeforeValidator(_no_true_rate), Field(gt=0)]] = {}
    """Learning rate of the parameters that a glob takes, such as {"*.LayerNorm.*": 1e-4}; wins over the others."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How learning rates fall after the warm-up: to zero along a line or a cosine, or not at all."""
    warmup: Warmup = 0.06
    """Below 1: fraction of all steps; from 1: a number of steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW weight decay of matrices and kernels; biases and norms have none."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Clip the global gradient norm; null for no clipping."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of new weights, the order of rows, dropout and augmentation."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on GPUs that have it, else fp32. Weights, optimizer state and norms are fp32 at every precision."""
    gradient_checkpointing: bool = False
    """Recompute the blocks above the first trainable one in the backward pass instead of keeping their activations."""
    skip_unread: bool = True
    """Where a head reads the first token alone, as that of BERT does, compute no other token in the last block."""
    compile: bool = False
    """Compile each block with torch.compile; the first steps take longer."""
    max_skipped: Annotated[int, Field(ge=0)] = 0
    """Steps that may be left out because their loss or gradients are not finite; the next one ends the run."""
    early_stop: PositiveInt | None = None
    """Stop after so many epochs without a better validation score; of several phases, the one that trains."""
    log_every: PositiveInt = 10
    """Optimizer steps between two lines of metrics."""

    def rows_per_process(self, world_size: int) -> int:
        """Rows of a global batch that each process takes. Raises UserError where they can't share it evenly."""
        share, rest = divmod(self.global_batch_size, world_size)
        if rest:
            works = " or ".join(str(n * world_size) for n in (share, share + 1) if n)
            raise UserError(
                f"train.global_batch_size: {self.global_batch_size} can't be divided over {world_size} processes; "
                f"use {works}"
            )
        return share


class PhaseSpec(Section):
    """One part of a run with a freeze of its own; what is left out comes from `train`."""

    name: Annotated[str, Field(min_length=1, max_length=40)]
    """What logs and reports call it."""
    freeze: Annotated[FreezeSpec, BeforeValidator(_freeze_section, json_schema_input_type=FreezeSpec | str | None)]
    """As in `freeze`."""
    epochs: Annotated[float, Field(gt=0)]
    """Passes over the training data; with `until`, the most that the phase may take."""
    until: Literal["plateau"] | None = None
    """plateau: the phase ends at the first evaluation without a better score."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """As in `train`, and so for the next three."""
    head_lr: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the head."""
    schedule: Literal["linear", "cosine", "constant"] | None = None
    """Over the steps of this phase."""
    warmup: Warmup | None = None
    """Before them."""


class ShardSpec(Section):
    strategy: Literal["auto"] | Strategy = "auto"
    """How training state is spread over ranks; auto takes the cheapest that fits and says why."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """Keep optimizer state, or weights too, in host memory: less GPU memory, slower steps."""
    frozen: Literal["auto", "replicate", "shard"] = "auto"
    """Frozen weights under fsdp: a copy on each rank, or shared out; auto copies them where that fits."""
    deepspeed: dict[str, Any] = {}
    """Extra DeepSpeed keys; refused where they contradict the plan."""


class CacheSpec(Section):
    """Activations of the frozen prefix, computed once and stored. `cache: off` is short for `cache: {mode: off}`."""

    mode: Literal["auto", "on", "off"] = "auto"
    """auto: where the frozen part is a prefix of the model, several passes share it, and it pays as measured."""
    views: PositiveInt | None = None
    """Store so many augmented versions of each training image, and cycle through them."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Number type on disk; bf16 halves the size and rounds."""
    folder: str | None = None
    """Where to keep it, a fast disk that all ranks see; left out: <output>/.cache."""
    quota: Annotated[
        int,
        BeforeValidator(parse_bytes, json_schema_input_type=int | str),
        Field(json_schema_extra={"default": "100GiB"}),
    ] = 100 * 2**30
    """Bytes (or "100GiB") that all entries may take; the least recently used go first, none of the last day."""


class CheckpointSpec(Section):
    every: Annotated[Interval, Field(json_schema_extra={"default": "1 epoch"})] = (1.0, "epochs")
    """How often to save: "200 steps", "30 min" or "1 epoch"."""
    keep: PositiveInt = 2
    """Newest checkpoints to keep; older ones go once a newer one is complete."""
    best: (
        Literal[
            "eval/accuracy", "eval/loss", "eval/f1", "eval/f1_macro", "eval/precision", "eval/recall",
            "eval/mse", "eval/mae", "eval/r2", "eval/pearson", "eval/spearman",
        ]
        | None
    ) = None  # fmt: skip
    """Also keep the checkpoint with the best value, and export that model instead of the last. A metric of the task."""
    full: bool = False
    """Store frozen weights too; without it the base model must stay at hand."""


class TrackSpec(Section):
    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """auto: online when logged in, else offline."""
    project: str = "dist-finetune"
    """Project of W&B."""
    entity: str | None = None
    """User or team of W&B; left out: your own."""
    tensorboard: bool = False
    """Also write TensorBoard event files into <run>/tensorboard (needs the tensorboard package)."""


class LaunchSpec(Section):
    cpu_threads: AutoOrPositive = "auto"
    """Threads a rank uses for CPU work; auto: cores of the node divided by its ranks."""
    timeout: DurationS = 1800.0
    """Seconds (or "30 min") that a collective of a training or evaluation step waits for an absent rank."""
    file_timeout: DurationS = 7200.0
    """The same where ranks wait for one that reads or writes files: data, weights, cache, checkpoints, the model."""
    join_timeout: DurationS = 180.0
    """Seconds that ranks wait for each other at the start; then the absent ones are named."""
    time_limit: DurationS | None = None
    """Stop with a checkpoint after so long, such as "3.5 h"; the run can be resumed."""
    max_restarts: Annotated[int, Field(ge=0, le=100)] = 0
    """How often `run` and `resume` start all processes again from the last checkpoint after one has failed."""
    slurm: Annotated[SlurmSpec, BeforeValidator(_section)] = SlurmSpec()
    cloud: Annotated[CloudSpec, BeforeValidator(_section)] = CloudSpec()


class Spec(Section):
    """A whole config file."""

    model: Annotated[ModelSpec, BeforeValidator(_section)]
    """Which model, and its weights, such as `model: {name: bert-base-uncased}`."""
    data: Annotated[DataSpec, BeforeValidator(_section)]
    """What to train and to evaluate on, such as `data: {train: rows.csv}`."""
    task: Literal["classification", "multilabel", "regression", "token-classification", "features"] | None = None
    """Found from the label column when left out: a class, several labels, a real number, or a tag for each word.
    features: fit linear heads and SVMs on extracted features instead of training."""
    features: Annotated[FeaturesSpec, BeforeValidator(_section)] = FeaturesSpec()
    strategy: Literal["auto"] | None = None
    """auto: measure the data with probes first (as `advise` does), then take the freeze and rates that follow."""
    freeze: Annotated[FreezeSpec, BeforeValidator(_freeze_section, json_schema_input_type=FreezeSpec | str | None)] = (
        FreezeSpec()
    )
    """A ready word (none, backbone, norms, bias-only, all-but-last N) or rules; left out: nothing is frozen."""
    train: Annotated[TrainSpec, BeforeValidator(_section)] = TrainSpec()
    phases: tuple[PhaseSpec, ...] | Literal["gradual", "lp-ft"] = ()
    """Parts of the run with a freeze each, instead of `freeze`; or a ready word. gradual: the head in the first
    epoch, then a larger part from the top in each, the whole model in the last (ULMFiT). lp-ft: the head alone for an
    epoch, then what `freeze` leaves (Kumar 2022)."""
    shard: Annotated[ShardSpec, BeforeValidator(_section)] = ShardSpec()
    cache: Annotated[CacheSpec, BeforeValidator(_cache_section, json_schema_input_type=CacheSpec | str | None)] = (
        CacheSpec()
    )
    """auto, on, off, or a block: activations of the frozen prefix, computed once."""
    checkpoint: Annotated[CheckpointSpec, BeforeValidator(_section)] = CheckpointSpec()
    track: Annotated[TrackSpec, BeforeValidator(_section)] = TrackSpec()
    launch: Annotated[LaunchSpec, BeforeValidator(_section)] = LaunchSpec()
    name: Annotated[str, Field(min_length=1, max_length=100)]
    """Name of the run; its folder is <output>/<name>. Found from the config's file name when left out."""
    output: str = "runs"
    """Folder that holds the folders of all runs."""

    @property
    def label_task(self) -> TaskName | None:
        """What the labels are said to be for; None where that is to be found."""
        return None if self.task == "features" else self.task

    @field_validator("name")
    @classmethod
    def _one_folder(cls, name: str) -> str:
        if name in {".", ".."} or any(c in name for c in "/\\\0") or any(ord(c) < 32 for c in name):
            raise ValueError(f"{name!r} can't name one folder; use letters, digits, '-', '_' and '.'")
        if len(name.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES:
            raise ValueError(
                f"{name!r} takes more than {MAX_NAME_BYTES} bytes of a folder's name (as UTF-8); choose a shorter one"
            )
        return name
