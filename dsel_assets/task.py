"""The task: the YAML file that a user writes, every knob documented and checked here and only here.

Light on purpose (pydantic and yaml only): the code location imports it at start-up.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
NEED_TARGET = (
    *("itl", "bads", "bads_joint", "smallloss", "gradmatch", "target_only"),
    *("cosine", "information_density", "facility_target"),
)


OURS = (  # columns of tables that a column of the data must not be taken for
    *("id", "example_id", "row", "content_digest", "label", "group", "source", "arrival"),
    *("rank", "weight", "strategy", "input"),
)


class TaskError(ValueError):
    """A task file that can't be used: the message names file, key and what is allowed."""


class _Spec(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, strict=True, allow_inf_nan=False
    )


class Schema(_Spec):
    """What a row of the data holds; the same for pool, target, validation and test."""

    input: str = Field("image", description="column with the model's input")
    label: str = Field("label", description="column with the class, as an index or a name")
    group: str | None = Field(None, description="column with the row's source or vendor")
    id: str | None = Field(None, description="column with an id; without one, the content's hash")
    kind: Literal["image", "vector"] = Field(
        "image", description="integers are divided by 255 in images"
    )
    shape: list[Annotated[int, Field(ge=1)]] = Field(
        min_length=1, description="shape of one input, e.g. [28, 28]"
    )
    cost: str | None = Field(
        None, description="column of the pool with what an example costs: tokens, seconds, money"
    )
    keep: list[str] = Field(
        [], description="further columns of the pool, of text or whole numbers, for quotas"
    )
    text: list[str] = Field(
        [], description="columns of the pool with long text, which goes into exports unread"
    )
    classes: list[str] = Field(description="number of classes, or their names in order")

    @field_validator("classes", mode="before")
    @classmethod
    def _count_or_names(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool) and value >= 2:
            return [str(index) for index in range(value)]
        if isinstance(value, list) and all(type(name) in (str, int) for name in value):
            names = [str(name) for name in value]
            if len(set(names)) == len(names) >= 2:
                return names
        raise ValueError(
            "a number of classes (at least 2), or a list of distinct names; YAML reads no, yes, on "
            "and off as booleans, so put such names in quotes"
        )


class PoolSpec(_Spec):
    """Where examples to choose from arrive."""

    landing: str = Field(
        description="folder or URL watched for .parquet, .jsonl, .jsonl.gz; or bundled:<name>"
    )
    columns: Schema = Field(alias="schema", description="the contract that every row must meet")
    leak_similarity: float = Field(
        0.985,
        gt=0,
        le=1,
        description="cosine from which a pool row counts as a copy of an evaluation row",
    )
    max_quarantine: float = Field(
        0.2,
        ge=0,
        le=1,
        description="share of an arrival's rows that may be quarantined before it is held back",
    )


class Source(_Spec):
    """A fixed set of examples."""

    source: str = Field(description="file (.parquet, .jsonl, .jsonl.gz), or bundled:<name>/<split>")


class Lora(_Spec):
    """Low-rank adapters beside linear layers; finetune.trainable: lora trains them alone."""

    rank: int = Field(8, ge=1, description="rank of each adapter")
    alpha: float = Field(16.0, gt=0, description="each adapter's product is scaled by alpha / rank")
    modules: list[str] = Field(
        ["*"], min_length=1, description="patterns of the linear layers' names"
    )


class ModelSpec(_Spec):
    """What is finetuned, from which checkpoint."""

    kind: Literal["torch"] = Field("torch", description="family of models")
    name: Literal["small_cnn", "mlp"] = Field("small_cnn", description="architecture")
    base: str = Field(description="safetensors file to start from, or bundled:<name>")
    lora: Lora | None = Field(None, description="adapters beside its linear layers; none: without")


class Finetune(_Spec):
    """The training that every strategy gets, the same for all."""

    trainable: str | Annotated[list[str], Field(min_length=1)] = Field(
        "all", description="all, head (the last layer), lora, or patterns of parameter names"
    )
    steps: int = Field(400, ge=1, description="optimiser steps, whatever the subset's size")
    batch_size: int = Field(32, ge=1, description="examples a step")
    lr: float = Field(1e-3, gt=0, description="Adam's learning rate, decayed to 0 by a cosine")
    include_target: bool = Field(True, description="train on the target set as well")


class GradientSpec(_Spec):
    """How per-example gradients are taken."""

    of: Literal["loss", "outputs"] = Field(
        "loss", description="of the loss, one an example, or of the model's outputs, one an output"
    )
    labels: Literal["true", "predicted", "drawn"] = Field(
        "true",
        description="label that the loss is taken at: the example's own, the most probable, or one "
        "drawn from the model's softmax, for an id always the same; outputs have none",
    )
    outputs: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="of: outputs: so many fixed random combinations of the outputs, the same for "
        "all examples and unbiased for moments and inner products; none: every output",
    )
    block: int = Field(
        64, ge=1, description="gradients that are formed at a time; halved when memory runs out"
    )
    keep_raw_bytes: int = Field(
        0, ge=0, description="keep an arrival's raw gradients if they take at most this many bytes"
    )

    @field_validator("labels", mode="before")
    @classmethod
    def _not_a_boolean(cls, value: Any) -> Any:
        return "true" if value is True else value  # as YAML reads an unquoted true

    @model_validator(mode="after")
    def _outputs_or_loss(self) -> GradientSpec:
        if self.of == "loss" and self.outputs is not None:
            raise ValueError("outputs: only with of: outputs")
        if self.of == "outputs" and self.labels != "true":
            warnings.warn("gradients.labels: ignored, outputs have no label", stacklevel=2)
        return self


class SketchSpec(_Spec):
    """The linear operator that every gradient goes through, fixed for the life of the store."""

    kind: Literal[
        "affd",
        "countsketch",
        "tensorsketch",
        "logra",
        "sjlt",
        "srht",
        "fjl",
        "ffd",
        "afjl",
        "qk",
        "rademacher",
        "gaussian",
    ] = Field("affd", description="operator; docs/sketching.md says which to take")
    dim: int | Literal["auto"] = Field(
        1024, description="dimension D; auto takes the spectrum's advice once and pins it"
    )
    seed: int = Field(0, ge=0, description="seed of the operator")

    @field_validator("dim")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("a positive dimension, or auto")
        return value


class SpectrumSpec(_Spec):
    """The Hessian spectrum at the base checkpoint, and along finetuning."""

    curvature: Literal["hessian", "gauss_newton"] = Field(
        "hessian", description="of the loss, or its part that is positive semi-definite"
    )
    examples: int = Field(256, ge=1, description="pool examples that the loss is averaged over")
    batch_size: int = Field(1024, ge=1, description="examples that are in memory at a time")
    eigenvalues: int = Field(20, ge=2, description="how many to report, from both ends")
    iterations: int = Field(40, ge=4, description="Lanczos steps")
    sketch_dim: Annotated[int, Field(ge=16)] | None = Field(
        None, description="dimension of a sketch to look through; none: exact"
    )
    steps: list[Annotated[int, Field(ge=0)]] = Field(
        [0, 10, 50, 100, 200, 400],
        description="steps of finetuning at which it can be taken; those that training reaches",
    )
    tolerance: float = Field(
        0.25,
        gt=0,
        description="relative error of the smallest outlier that the advised dimension allows",
    )


class IntrinsicSpec(_Spec):
    """The search for the dimension that finetuning needs."""

    share: float = Field(
        0.9, gt=0, le=1, description="of the validation accuracy that all dimensions reach"
    )
    delta: float = Field(0.01, gt=0, description="the dimension doubles when a round gains less")
    steps: int = Field(50, ge=1, description="optimiser steps a round")
    start: int = Field(16, ge=1, description="the first dimension")
    dim: int = Field(4096, ge=1, description="the last dimension: that of the sketch")
    lr: float = Field(5e-3, gt=0, description="Adam's learning rate, constant")

    @model_validator(mode="after")
    def _room(self) -> IntrinsicSpec:
        if self.start > self.dim:
            raise ValueError("start: at most dim")
        return self


class Random(_Spec):
    """A uniform draw: what every strategy is compared with."""


class Full(_Spec):
    """The whole pool, whatever the budget."""


class TargetOnly(_Spec):
    """Nothing from the pool: what the target set alone gives."""


class Skmm(_Spec):
    """Sketchy Moment Matching (arXiv:2407.06120)."""

    solver: Literal["auto", "sequential", "convex"] = Field(
        "auto", description="one example after the other, or the convex problem; auto: sequential"
    )
    dimension: Annotated[int, Field(ge=1)] | None = Field(
        None, description="m to which sketches are reduced; none: min(4 r, budget / 1.5)"
    )
    c: float = Field(0.999, gt=0, lt=1, description="convex: c_S of the moment condition")
    tol: float = Field(
        1e-4, gt=0, description="convex: duality gap to stop at, relative to a uniform draw's"
    )
    rounding: Literal["sample", "systematic", "pivotal"] = Field(
        "sample", description="convex: how the weights become a subset"
    )


class BadsJoint(_Spec):
    """Bayesian data point selection (arXiv:2411.03768), judged by the model of its own run."""

    beta: float = Field(
        0.5, gt=0, lt=1, description="believed useful fraction of the pool, never the budget"
    )
    sigma: float = Field(0.05, gt=0, description="tolerance of the prior on the mean weight")
    mode: Literal["paper", "sgld"] = Field(
        "paper", description="an optimiser with a small noise, or Langevin dynamics"
    )
    weighting: Literal["each", "network"] = Field(
        "each", description="a logit an example, or a network that also scores new ones"
    )
    chains: int = Field(1, ge=1, description="chains a seed, whose samples are merged")
    steps: int = Field(1000, ge=10, description="steps of a chain, at most")
    tolerance: float | None = Field(
        None, gt=0, lt=1, description="stop early at a rank correlation of 1 - tolerance"
    )
    batch_size: int = Field(100, ge=1, description="pool examples a step")
    meta: float = Field(1.0, ge=0, description="factor of the target's mean loss")
    temperature: float = Field(1.0, gt=0, description="sgld: 1 is the posterior")


class Bads(BadsJoint):
    """Bayesian data point selection: chosen by the inferred weights, then finetuned."""

    pick: Literal["sample", "top", "lower", "bernoulli"] = Field(
        "sample",
        description="sample: without replacement, by the mean weight; top: the largest; lower: the "
        "largest mean - sd; bernoulli: each by its own draw",
    )
    compare_cold: bool = Field(
        False, description="after a warm start, also run fresh chains and report how far they are"
    )


class _Trains(_Spec):
    """What strategies train for their scores, from the base model."""

    steps: int = Field(400, ge=1, description="optimiser steps of a training")
    batch_size: int = Field(32, ge=1, description="examples a step")
    lr: float = Field(1e-3, gt=0, description="Adam's learning rate, decayed to 0 by a cosine")


class SmallLoss(_Trains):
    """The smallest losses under a model trained on the target alone."""

    per_class: bool = Field(False, description="labels take turns")


class Cleanlab(_Trains):
    """Confident learning (arXiv:1911.00068): labels that models of the other rows agree with."""

    method: Literal["self_confidence", "normalized_margin", "confidence_weighted_entropy"] = Field(
        "self_confidence", description="cleanlab's score of a label"
    )
    folds: int = Field(
        5, ge=2, description="parts of the pool, each scored by a model of the others"
    )


class Until(_Spec):
    """Where picking ends before the budget does, whichever comes first."""

    target_variance: float | None = Field(
        None, gt=0, description="no target's variance is above it; rows have unit norm, so below 1"
    )
    gain: float | None = Field(None, gt=0, description="the next pick would gain fewer nats")


class Itl(_Spec):
    """Information-based transductive learning (arXiv:2402.15898)."""

    rule: Literal["itl", "vtl", "ctl", "mm_itl", "undirected_itl"] = Field(
        "itl", description="what makes a row worth picking; docs/itl.md"
    )
    form: Literal["paper", "library"] = Field("paper", description="noise inside the ratio, or not")
    noise: float | None = Field(
        None, gt=0, description="observation variance; none: the mean squared norm"
    )
    kernel: Literal["linear", "rbf", "matern"] = Field(
        "linear", description="on the sketches' directions"
    )
    preselect: Annotated[int, Field(ge=1)] | None = Field(
        None, description="choose only from so many nearest candidates of each target"
    )
    until: Until | None = Field(None, description="end before the budget does")


class Gradmatch(_Spec):
    """Gradients like the target's, class by class, in the manner of LESS (arXiv:2402.04333)."""

    how: Literal["cosine", "dot", "trak"] = Field("cosine", description="score of likeness")
    round_robin: bool = Field(
        True, description="the target's classes take in turn; else the highest mean score"
    )
    damping: float = Field(
        0.1, gt=0, description="trak: added to the Fisher, in units of its mean eigenvalue"
    )


class KCenter(_Spec):
    """Greedy k-center: covers the pool, outliers first."""


class Herding(_Spec):
    """Herding: follows the pool's mean."""

    form: Literal["original", "published"] = Field(
        "original", description="published: as in DeepCore, which takes the farthest"
    )


class Adaptive(_Spec):
    """Adaptive sampling, or random pivoting: by what is not spanned yet."""


class Leverage(_Spec):
    """Sampling in proportion to leverage scores."""

    ridge: float | None = Field(
        None,
        gt=0,
        description="in units of the Gram's mean eigenvalue; none: truncated at the intrinsic "
        "dimension",
    )


class Cosine(_Spec):
    """The largest mean cosine of the gradient to the target's."""


class InformationDensity(_Spec):
    """The base model's entropy times the cosine to the target."""

    beta: float = Field(1.0, gt=0, description="exponent of the cosine")


class Uncertain(_Spec):
    """Examples of which the base model is least sure."""


class KMeansPlusPlus(_Spec):
    """k-means++ seeding on the sketches."""


class Badge(_Spec):
    """k-means++ on the last layer's gradients at the predicted labels (arXiv:1906.03671)."""


class TypiClust(_Spec):
    """The most typical example of each cluster (arXiv:2202.02794)."""

    neighbours: int = Field(20, ge=1, description="that typicality looks at")
    most_clusters: int = Field(500, ge=1, description="there are as many as the budget, up to this")
    small: int = Field(5, ge=0, description="clusters of so many rows or fewer come last")


class ProbCover(_Spec):
    """Balls that cover the most examples (arXiv:2205.11320)."""

    delta: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="radius on the unit sphere; none: where 95 % of balls are pure"
    )


class Facility(_Spec):
    """Facility location: every example, or every target, has a chosen one near it."""


class Strategies(_Spec):
    """The strategies that are compared; random and full always are."""

    random: Random = Random()
    full: Full = Full()
    target_only: TargetOnly | None = None
    skmm: Skmm | None = None
    bads: Bads | None = None
    bads_joint: BadsJoint | None = None
    smallloss: SmallLoss | None = None
    cleanlab: Cleanlab | None = None
    itl: Itl | None = None
    gradmatch: Gradmatch | None = None
    kcenter: KCenter | None = None
    herding: Herding | None = None
    adaptive: Adaptive | None = None
    leverage: Leverage | None = None
    cosine: Cosine | None = None
    information_density: InformationDensity | None = None
    entropy: Uncertain | None = None
    margin: Uncertain | None = None
    least_confidence: Uncertain | None = None
    kmeanspp: KMeansPlusPlus | None = None
    badge: Badge | None = None
    typiclust: TypiClust | None = None
    probcover: ProbCover | None = None
    facility: Facility | None = None
    facility_target: Facility | None = None

    def chosen(self) -> dict[str, _Spec]:
        """The strategies that this task runs, with their settings, in a fixed order."""
        named = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: settings for name, settings in named.items() if settings is not None}


class Active(_Spec):
    """Rounds of asking for labels: choose unlabelled rows, wait for their labels, train, again."""

    candidates: str = Field(
        description="folder or URL with rows that have no label yet: .parquet, .jsonl, .jsonl.gz; "
        "labelled ones come back through pool.landing"
    )
    batch: int = Field(50, ge=1, description="labels to ask for in a round")
    rounds: Annotated[int, Field(ge=1)] | None = Field(None, description="at most; none: no end")
    wait_for: float = Field(
        1.0, gt=0, le=1, description="share of the asked labels that begins the next round"
    )
    rule: Literal["itl", "vtl", "ctl", "mm_itl", "undirected_itl"] = Field(
        "itl", description="what makes a row worth its label; docs/itl.md"
    )
    noise: float | None = Field(
        None, gt=0, description="observation variance; none: the mean squared norm"
    )
    schedule: str | None = Field(
        None, description="cron line for a look at what was labelled, beside the arrivals"
    )


class Promote(_Spec):
    """The rule by which a selection becomes the champion. Reads validation, never test."""

    against: Literal["random"] = Field("random", description="the strategy to beat")
    budget: int = Field(description="the budget at which strategies are judged")
    metric: Literal["accuracy"] = Field(
        "accuracy", description="per-example score that is compared"
    )
    confidence: float = Field(0.95, gt=0.5, lt=1, description="level of the intervals and tests")


Quota = Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, le=1)]


class Task(_Spec):
    """A selection task. The file's name is the task's name."""

    name: str
    pool: PoolSpec
    target: Source | None = Field(
        None, description="small, clean, of the task that matters; strategies read it"
    )
    validation: Source = Field(description="promotion and every choice of a setting read this")
    test: Source = Field(description="only reported")
    model: ModelSpec
    finetune: Finetune = Finetune()
    gradients: GradientSpec = GradientSpec()
    sketch: SketchSpec = SketchSpec()
    spectrum: SpectrumSpec = SpectrumSpec()
    intrinsic: IntrinsicSpec = IntrinsicSpec()
    strategies: Strategies = Strategies()
    active: Active | None = Field(None, description="ask for labels, in rounds")
    reselect: Literal["warm", "cold"] = Field(
        "warm", description="after an arrival go on from the last selection, where a strategy can"
    )
    budgets: list[Annotated[int, Field(ge=1)]] = Field(
        min_length=1, description="how many examples to choose, ascending; or how much of the cost"
    )
    budget_in: Literal["examples", "cost"] = Field(
        "examples", description="what budgets count: examples, or the sum of pool.schema.cost"
    )
    quotas: dict[str, dict[str, Quota]] = Field(
        {},
        description="column -> value -> a share of the budget (0.25) or a number of examples (50); "
        "the column is the label's, the group's or one that pool.schema keeps; what a value can't "
        "fill goes to the others",
    )
    seeds: int = Field(5, ge=2, description="paired seeds a budget; an interval needs at least 2")
    schedule: str | None = Field(
        None, description="cron line for a re-selection beside the arrivals"
    )
    promote: Promote

    @field_validator("quotas", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """Values that YAML read as numbers are names."""
        if not isinstance(value, dict):
            return value
        return {
            column: {str(name): quota for name, quota in asked.items()}
            if isinstance(asked, dict)
            else asked
            for column, asked in value.items()
        }

    @model_validator(mode="after")
    def _fits_together(self) -> Task:
        if list(self.budgets) != sorted(set(self.budgets)):
            raise ValueError("budgets: must ascend and not repeat")
        if self.promote.budget not in self.budgets:
            raise ValueError(f"promote.budget: must be one of the budgets {list(self.budgets)}")
        if self.target is None:
            for name in NEED_TARGET:
                if getattr(self.strategies, name) is not None:
                    raise ValueError(f"strategies.{name}: needs a target set; give target.source")
            if self.active is not None and self.active.rule != "undirected_itl":
                raise ValueError("active: needs a target set, or rule: undirected_itl")
            if self.finetune.include_target:
                raise ValueError("finetune.include_target: there is no target; set it to false")
        if self.strategies.target_only is not None and not self.finetune.include_target:
            raise ValueError("strategies.target_only: needs finetune.include_target: true")
        self._check_spending()
        sides = self.pool.columns.shape
        if self.model.name == "small_cnn" and (len(sides) != 2 or any(s % 4 for s in sides)):
            raise ValueError(
                f"pool.schema.shape: small_cnn needs two sides divisible by 4, not {sides}"
            )
        if self.finetune.trainable == "lora" and self.model.lora is None:
            raise ValueError("finetune.trainable: lora needs model.lora")
        if self.finetune.trainable == "head" and self.model.lora is not None:
            raise ValueError("model.lora: would not be trained by finetune.trainable: head")
        classes = len(self.pool.columns.classes)
        if self.gradients.outputs is not None and self.gradients.outputs >= classes:
            raise ValueError(
                f"gradients.outputs: fewer than the {classes} classes; leave it out for every one"
            )
        if self.spectrum.eigenvalues > self.spectrum.iterations:
            raise ValueError("spectrum.eigenvalues: at most spectrum.iterations")
        if list(self.spectrum.steps) != sorted(set(self.spectrum.steps)):
            raise ValueError("spectrum.steps: must ascend and not repeat")
        crons = {"schedule": self.schedule}
        if self.active is not None:
            crons["active.schedule"] = self.active.schedule
        for key, cron in crons.items():
            if cron is not None and len(cron.split()) != 5:
                raise ValueError(f'{key}: a cron line of five fields, e.g. "0 6 * * 1"')
        return self

    def _check_spending(self) -> None:
        schema = self.pool.columns
        own = [n for n in (schema.cost, *schema.keep, *schema.text) if n is not None]
        fixed = {schema.input, schema.label, schema.group, schema.id, *OURS}
        for name in own:
            if name in fixed or own.count(name) > 1:
                raise ValueError(
                    f"pool.schema.cost, keep, text: {name!r} is used already, or is a name of "
                    "ours; the label's and the group's column need not be kept"
                )
        if self.budget_in == "cost" and schema.cost is None:
            raise ValueError("budget_in: cost needs pool.schema.cost, the column with it")
        if self.budget_in == "cost" and self.quotas:
            raise ValueError("quotas: count examples, so they don't go with budget_in: cost")
        if len(self.quotas) > 1:
            raise ValueError(f"quotas: of one column, not of {', '.join(self.quotas)}")
        for column, asked in self.quotas.items():
            known = [n for n in (schema.label, schema.group, *schema.keep) if n is not None]
            if column not in known:
                raise ValueError(f"quotas.{column}: must be one of the columns {', '.join(known)}")
            unknown = set(asked) - set(schema.classes) if column == schema.label else set()
            if unknown:
                raise ValueError(f"quotas.{column}: no classes {', '.join(sorted(unknown))}")
            if sum(share for share in asked.values() if isinstance(share, float)) > 1 + 1e-9:
                raise ValueError(f"quotas.{column}: the shares add up to more than 1")

    def settings(self, strategy: str) -> dict[str, Any]:
        """The settings of one strategy, as plain values."""
        return self.strategies.chosen()[strategy].model_dump()


def load_task(path: str | Path) -> Task:
    """Read and check one task file; `TaskError` says in one line what is wrong and where."""
    path = Path(path)
    if not NAME.fullmatch(path.stem):
        raise TaskError(f"{path}: a task's name is lower case letters, digits and _, at most 40")
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TaskError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise TaskError(f"{path}: a task is a mapping of keys, see tasks/digits.yaml")
    if isinstance(content.get("strategies"), dict):
        # `skmm:` with nothing behind it is the natural way to say "with its defaults"
        content["strategies"] = {
            k: {} if v is None else v for k, v in content["strategies"].items()
        }
    try:
        if "name" in content:
            raise TaskError(f"{path}: name: unknown key; the name of the file is the task's name")
        return Task.model_validate(content | {"name": path.stem})
    except ValidationError as error:
        raise TaskError(f"{path}: " + "; ".join(map(_explain, error.errors()))) from None


def load_tasks(folder: str | Path) -> list[Task]:
    """Every task of a folder, by name."""
    return [load_task(path) for path in sorted(Path(folder).glob("*.yaml"))]


def shortened(task: Task) -> Task:
    """The same task with two seeds, two budgets and little training: it concludes nothing."""
    budgets = sorted({task.budgets[0], task.promote.budget})
    strategies = task.strategies.model_copy(
        update={
            name: settings.model_copy(update={"steps": min(100, settings.steps)})
            for name, settings in task.strategies.chosen().items()
            if isinstance(settings, (BadsJoint, _Trains))
        }
    )
    finetune = task.finetune.model_copy(update={"steps": min(40, task.finetune.steps)})
    return task.model_copy(
        update={
            "name": f"{task.name}_quick",  # its champion and its tables are not the task's
            "budgets": budgets,
            "seeds": 2,
            "finetune": finetune,
            "strategies": strategies,
        }
    )


def warn_about_budgets(task: Task, rows: int) -> None:
    """Say which budgets the pool can't fill: selecting then takes everything."""
    for budget in task.budgets:
        if budget >= rows:
            warnings.warn(
                f"{task.name}: budgets: {budget} takes all {rows} examples of the pool",
                stacklevel=2,
            )


def _explain(error: Any) -> str:
    path = ".".join(str(part) for part in error["loc"])
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return f"{path}: unknown key; allowed are {', '.join(_allowed(error['loc'][:-1]))}"
    given = "" if error["type"] in ("missing", "value_error") else f", not {error['input']!r}"
    return f"{path}: {message}{given}" if path else message


def _allowed(path: tuple[int | str, ...]) -> list[str]:
    model: Any = Task
    for part in path:
        fields = {field.alias or name: field for name, field in model.model_fields.items()}
        annotation = fields[str(part)].annotation
        options = getattr(annotation, "__args__", (annotation,))
        model = next(option for option in options if hasattr(option, "model_fields"))
    return [field.alias or name for name, field in model.model_fields.items() if name != "name"]
