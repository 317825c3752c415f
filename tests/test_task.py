"""The declaration that a user writes: what is refused, and what the message says."""

import copy
import warnings
from pathlib import Path

import pytest
import yaml

from dsel_assets.resources.store import identity
from dsel_assets.task import (
    Itl,
    Skmm,
    Task,
    TaskError,
    load_task,
    load_tasks,
    shortened,
    warn_about_budgets,
)

EXAMPLE = Path(__file__).parents[1] / "tasks" / "digits.yaml"
MINIMAL = {
    "pool": {"landing": "landing", "schema": {"shape": [4], "classes": 2}},
    "validation": {"source": "v.parquet"},
    "test": {"source": "t.parquet"},
    "model": {"name": "mlp", "base": "base.safetensors"},
    "finetune": {"include_target": False},
    "budgets": [5, 10],
    "promote": {"budget": 10},
}
WITH_TARGET = {**MINIMAL, "target": {"source": "target.parquet"}, "finetune": {}}
MISSING = object()


@pytest.fixture
def load(tmp_path):
    def load(content, name="letters"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return load_task(path)

    return load


def changed(path, value, base=WITH_TARGET):
    content = copy.deepcopy(base)
    *above, last = path.split(".")
    at = content
    for key in above:
        at = at.setdefault(key, {})
    if value is MISSING:
        del at[last]
    else:
        at[last] = value
    return content


def test_the_example_task_loads_as_it_is_written():
    task = load_task(EXAMPLE)
    written = yaml.safe_load(EXAMPLE.read_text())
    assert task.name == "digits"
    assert list(task.budgets) == written["budgets"] and task.seeds == written["seeds"]
    assert list(task.strategies.chosen()) == list(written["strategies"])
    assert task.settings("bads")["beta"] == written["strategies"]["bads"]["beta"]
    assert task.pool.columns.classes == [str(digit) for digit in range(10)]


def test_the_defaults_are_enough(load):
    task = load(MINIMAL)
    assert set(task.strategies.chosen()) == {"random", "full"}
    assert task.sketch.dim == 1024 and task.target is None


@pytest.mark.parametrize(
    "path, value",
    [
        ("bugdets", [1]),
        ("pool.schema.colour", "red"),
        ("pool.url", "x"),
        ("strategies.less", {}),
        ("strategies.skmm", {"gamma": 1}),
        ("target.path", "x"),
        ("finetune.epochs", 3),
        ("promote.level", 0.9),
    ],
)
def test_an_unknown_key_is_refused_with_its_path_and_what_is_allowed(load, path, value):
    with pytest.raises(TaskError, match=rf"letters\.yaml: {path}.*unknown key; allowed are \w+"):
        load(changed(path, value))


def test_the_name_is_that_of_the_file(load):
    assert load(MINIMAL, "greek").name == "greek"
    with pytest.raises(TaskError, match=r"letters\.yaml: name: unknown key; the name of the file"):
        load(changed("name", "other"))


def test_allowed_keys_are_those_that_a_user_writes(load):
    with pytest.raises(TaskError, match="allowed are landing, schema, leak_similarity"):
        load(changed("pool.columns_", {}))


@pytest.mark.parametrize(
    "path, value",
    [
        ("pool", "landing"),
        ("pool.landing", 3),
        ("pool.schema.shape", []),
        ("pool.schema.shape", [28, 0]),
        ("pool.schema.shape", 28),
        ("pool.schema.classes", 1),
        ("pool.schema.classes", True),
        ("pool.schema.classes", ["a", "a"]),
        ("pool.schema.classes", [True, False]),  # what YAML makes of [yes, no]
        ("pool.schema.classes", [["a"], ["b"]]),
        ("pool.schema.kind", "text"),
        ("pool.leak_similarity", 0),
        ("pool.max_quarantine", 1.5),
        ("validation", MISSING),
        ("test.source", None),
        ("model.kind", "tensorflow"),
        ("model.name", "resnet"),
        ("model.base", MISSING),
        ("finetune.steps", 0),
        ("finetune.steps", 10.5),
        ("finetune.steps", True),
        ("finetune.lr", 0),
        ("finetune.lr", -1e-3),
        ("finetune.lr", float("nan")),
        ("finetune.lr", float("inf")),
        ("finetune.batch_size", "32"),
        ("finetune.include_target", "yes"),
        ("finetune.trainable", 3),
        ("finetune.trainable", []),
        ("gradients.of", "jacobian"),
        ("gradients.labels", "random"),
        ("gradients.labels", False),
        ("gradients", {"of": "loss", "outputs": 3}),
        ("gradients", {"of": "outputs", "outputs": 0}),
        ("gradients", {"of": "outputs", "outputs": 2}),  # of two classes
        ("model.lora", {"rank": 0}),
        ("model.lora", {"alpha": 0}),
        ("model.lora", {"modules": []}),
        ("model.lora", {"dropout": 0.1}),
        ("finetune.trainable", "lora"),
        ("sketch.dim", 0),
        ("sketch.dim", -1),
        ("sketch.dim", "big"),
        ("sketch.dim", 1024.0),
        ("sketch.kind", "svd"),
        ("sketch.seed", -1),
        ("strategies.bads", {"beta": 1}),
        ("strategies.bads", {"beta": 0}),
        ("strategies.bads", {"pick": "best"}),
        ("strategies.skmm", {"tol": 0}),
        ("strategies.skmm", {"c": 1.5}),
        ("strategies.skmm", False),
        ("strategies.skmm", []),
        ("strategies.itl", {"noise": 0}),
        ("strategies.gradmatch", {"how": "less"}),
        ("strategies.gradmatch", {"damping": 0}),
        ("budgets", []),
        ("budgets", [0, 10]),
        ("budgets", [10, 5]),
        ("budgets", [10, 10]),
        ("budgets", 10),
        ("budgets", [5.0, 10]),
        ("seeds", 1),
        ("seeds", True),
        ("schedule", "weekly"),
        ("schedule", "0 6 * *"),
        ("promote.budget", 7),
        ("promote.against", "full"),
        ("promote.metric", "f1"),
        ("promote.confidence", 1),
        ("promote.confidence", 95),
    ],
)
def test_a_wrong_value_is_refused_with_its_path(load, path, value):
    with pytest.raises(TaskError, match=rf"letters\.yaml: {path}") as refused:
        load(changed(path, value))
    assert "\n" not in str(refused.value)


def test_every_fault_is_named_at_once(load):
    content = changed("seeds", 0, changed("finetune.steps", 0))
    with pytest.raises(TaskError, match=r"finetune\.steps.*; seeds"):
        load(content)


@pytest.mark.parametrize("strategy", ["itl", "bads", "gradmatch", "target_only"])
def test_what_reads_the_target_needs_one(load, strategy):
    with pytest.raises(TaskError, match=rf"strategies\.{strategy}: needs a target set"):
        load(changed("strategies", {strategy: {}}, MINIMAL))


def test_training_on_the_target_needs_one(load):
    with pytest.raises(TaskError, match=r"finetune\.include_target"):
        load(changed("finetune.include_target", True, MINIMAL))


def test_target_only_without_training_on_the_target_is_nothing(load):
    content = changed("strategies", {"target_only": {}})
    assert load(content).strategies.target_only is not None
    with pytest.raises(TaskError, match=r"strategies\.target_only"):
        load(changed("finetune.include_target", False, content))


def test_a_strategy_with_nothing_behind_it_has_its_defaults(load):
    task = load(changed("strategies", {"skmm": None, "itl": {"form": "library"}}))
    assert task.settings("skmm") == Skmm().model_dump()
    assert task.settings("itl") == Itl(form="library").model_dump()
    assert list(task.strategies.chosen()) == ["random", "full", "skmm", "itl"]


def test_equal_declarations_have_equal_settings(load):
    """A whole number where a float belongs is the same setting, so also the same identity."""
    one, other = (load(changed("finetune.lr", value)) for value in (1, 1.0))
    assert identity(one.finetune.model_dump()) == identity(other.finetune.model_dump())
    assert identity(one.model_dump(mode="json")) == identity(other.model_dump(mode="json"))


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words", "pool: [", "a: !!python/name:x"])
def test_what_is_no_mapping_is_refused_by_file(load, text):
    with pytest.raises(TaskError, match=r"letters\.yaml"):
        load(text)


def test_keys_that_are_no_words_are_refused(load):
    with pytest.raises(TaskError, match=r"letters\.yaml"):
        load({**WITH_TARGET, 5: "x"})
    with pytest.raises(TaskError, match=r"letters\.yaml"):
        load(changed("strategies", {True: {}}))


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "letters.yaml").write_bytes(b"pool: \xff\xfe\n")
    with pytest.raises(TaskError, match=r"letters\.yaml"):
        load_task(tmp_path / "letters.yaml")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(TaskError, match="nowhere"):
        load_task(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("name", ["Digits", "1st", "my-task", "a" * 41, "naïve"])
def test_names_that_make_no_asset_key_are_refused(load, name):
    with pytest.raises(TaskError, match="lower case letters"):
        load(MINIMAL, name)


def test_tasks_come_by_name(load, tmp_path):
    for name in ("zebra", "ape"):
        load(MINIMAL, name)
    (tmp_path / "README.md").write_text("not a task")
    assert [task.name for task in load_tasks(tmp_path)] == ["ape", "zebra"]


def test_a_shortened_task_is_a_valid_one_and_is_shorter():
    task = load_task(EXAMPLE)
    short = shortened(task)
    again = Task.model_validate(short.model_dump(by_alias=True))
    assert again.promote.budget in again.budgets
    assert short.seeds == 2 and len(short.budgets) <= 2
    assert short.finetune.steps < task.finetune.steps
    assert short.settings("bads")["steps"] < task.settings("bads")["steps"]
    assert task == load_task(EXAMPLE)


def test_shortening_lengthens_nothing(load):
    content = changed("strategies", {"bads": {"steps": 20}}, changed("finetune.steps", 3))
    short = shortened(load(content))
    assert short.finetune.steps == 3
    assert short.settings("bads")["steps"] == 20


def test_a_short_run_leaves_the_task_alone(load):
    assert shortened(load(MINIMAL)).name == "letters_quick"


def test_an_unquoted_true_is_the_true_label(load):
    """YAML reads it as a boolean."""
    assert load(changed("gradients.labels", True)).gradients.labels == "true"


def test_labels_of_outputs_are_told_to_be_ignored(load):
    content = changed("gradients", {"of": "outputs", "labels": "drawn"})
    with pytest.warns(UserWarning, match=r"gradients\.labels: ignored"):
        load(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(changed("gradients", {"of": "outputs", "outputs": 1}))


def test_adapters_that_the_head_would_not_train_are_refused(load):
    content = changed("model.lora", {}, changed("finetune.trainable", "head"))
    with pytest.raises(TaskError, match=r"model\.lora"):
        load(content)
    assert load(changed("finetune.trainable", "lora", content)).model.lora.rank == 8


@pytest.mark.parametrize("shape", [[4], [28, 30], [3, 28, 28]])
def test_a_shape_that_the_model_cannot_take_is_refused(load, shape):
    content = changed("pool.schema.shape", shape, changed("model.name", "small_cnn"))
    with pytest.raises(TaskError, match=r"pool\.schema\.shape: small_cnn needs two sides"):
        load(content)


def test_budgets_that_the_pool_cannot_fill_are_told(load):
    task = load(MINIMAL)
    with pytest.warns(UserWarning, match="letters: budgets: 10 takes all 8 examples"):
        warn_about_budgets(task, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_about_budgets(task, 11)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget_in": "cost"}, "needs pool.schema.cost"),
        ({"quotas": {"vendor": {"a": 1}}}, "quotas.vendor: must be one of the columns label"),
        ({"quotas": {"label": {"dog": 1}}}, "no classes dog"),
        ({"quotas": {"label": {0: 0.7, 1: 0.4}}}, "add up to more than 1"),
        ({"quotas": {"label": {0: 1}, "source": {"a": 1}}}, "of one column"),
        ({"quotas": {"label": {0: 1.5}}}, "quotas.label.0"),
        ({"quotas": {"label": {0: -1}}}, "quotas.label.0"),
        ({"quotas": {"label": 3}}, "quotas.label"),
    ],
)
def test_impossible_spending_is_refused(lab, changes, message):
    with pytest.raises(TaskError, match=message):
        lab.task(**changes)
