"""Plain SQL files as assets: one file is one query is one table, its checks are queries too.

What a model reads, in what order models run and which column comes from which is read from the
query itself. The files hold nothing but DuckDB's SQL and can be pasted into its shell.
"""

import hashlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

import dagster as dg
import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError
from sqlglot.lineage import lineage as column_lineage
from sqlglot.optimizer.qualify import qualify
from sqlglot.optimizer.scope import build_scope, traverse_scope
from sqlglot.tokens import TokenType

from dsel_assets.assets.declare import markdown
from dsel_assets.resources.warehouse import SOURCES, Sample, Warehouse

DIALECT = "duckdb"
FOLDERS = ("staging", "marts")
NAME = re.compile(r"[a-z][a-z0-9_]*")
OF = re.compile(r"^of:\s*(\S+)$", re.MULTILINE)


class SqlError(ValueError):
    """A SQL file that can't be used: the message names the file, the line and what is expected."""


@dataclass(frozen=True)
class Query:
    """One SELECT of one file. `name` is the file's stem, `description` its leading comment."""

    name: str
    path: Path
    text: str
    description: str
    tree: exp.Query

    @cached_property
    def upstream(self) -> frozenset[str]:
        """The tables that it reads; neither its CTEs nor table functions are among them."""
        return frozenset(
            source.name
            for scope in traverse_scope(self.tree)
            for source in scope.sources.values()
            if isinstance(source, exp.Table) and isinstance(source.this, exp.Identifier)
        )

    @cached_property
    def code_version(self) -> str:
        """A hash of what the query says: comments, layout and keywords' case do not change it."""
        return hashlib.sha256(self.tree.sql(DIALECT, comments=False).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Check(Query):
    """A query whose rows violate a rule about the model `of`."""

    of: str


def load_models(folder: str | Path) -> list[Query]:
    """The models in `staging/` and `marts/` of the folder, each after all that it reads.

    SqlError for a file that is not exactly one SELECT, for a name that is taken or no identifier,
    and for models that read each other in a circle.
    """
    models: dict[str, Query] = {}
    for path in sorted(path for name in FOLDERS for path in (Path(folder) / name).glob("*.sql")):
        model = Query(*_parse(path))
        if path.stem in SOURCES or path.stem in models:
            raise SqlError(f"{path}: there is a table {path.stem!r} already; rename the file")
        models[path.stem] = model
    reads = {name: sorted(model.upstream & models.keys()) for name, model in models.items()}
    try:
        return [models[name] for name in TopologicalSorter(reads).static_order()]
    except CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
        raise SqlError(f"{folder}: models read each other in a circle: {circle}") from None


def load_checks(folder: str | Path) -> list[Check]:
    """The checks of a folder, by name. A leading line `-- of: model` says what each is about.

    SqlError for a file that is not one SELECT, has no such line, or does not read that model.
    """
    checks = []
    for path in sorted(Path(folder).glob("*.sql")):
        name, path, text, description, tree = _parse(path)
        said = OF.search(description)
        if said is None:
            raise SqlError(f"{path}:1: say which model it checks: -- of: <model>")
        check = Check(name, path, text, OF.sub("", description).strip(), tree, said[1])
        if check.of not in check.upstream:
            raise SqlError(f"{path}: a check of {check.of!r} that does not read it")
        checks.append(check)
    return checks


def lineage(
    model: Query, schemas: Mapping[str, Mapping[str, str]]
) -> dict[str, list[tuple[str, str]]]:
    """For each column of a model the (table, column) pairs that its values are made of.

    `schemas` gives columns and types of every table that the model reads. A column that is made of
    no other (a literal, `count(*)`) has an empty list. SqlError where a column can't be resolved.
    """
    try:
        tree = qualify(model.tree.copy(), schema=dict(schemas), dialect=DIALECT)
        scope = build_scope(tree)
        found = {}
        for column in tree.named_selects:
            nodes = column_lineage(column, tree, {}, dialect=DIALECT, scope=scope).walk()
            leaves = (node for node in nodes if isinstance(node.source, exp.Table))
            pairs = {(leaf.source.name, leaf.name.rpartition(".")[2].strip('"')) for leaf in leaves}
            # a table function has no name; `*` is a whole row that is counted
            found[column] = sorted((t, c) for t, c in pairs if t and c != "*")
    except SqlglotError as error:
        raise SqlError(f"{model.path}: {error}") from error
    return found


_REQUESTED = dg.AutomationCondition.newly_requested() | dg.AutomationCondition.newly_updated()
EDITED = (
    (
        dg.AutomationCondition.code_version_changed().since(_REQUESTED)
        | dg.AutomationCondition.any_deps_match(dg.AutomationCondition.will_be_requested())
    )
    & ~dg.AutomationCondition.missing()
    & ~dg.AutomationCondition.in_progress()
)
"""The model's text changed, or a model that it reads is built again for that reason."""


def sql_assets(
    task_name: str,
    models: Sequence[Query],
    checks: Sequence[Check],
    upstream_keys: Mapping[str, dg.AssetKey],
) -> list[dg.AssetsDefinition]:
    """One asset for each model, under the key [task_name, model]; needs a resource `warehouse`.

    `upstream_keys` says which asset stands behind each table that is not a model. SqlError for a
    table that nobody makes and for a check of a model that is not there, or that reads a model
    which need not be built by then.
    """
    keys = dict(upstream_keys) | {m.name: dg.AssetKey([task_name, m.name]) for m in models}
    behind: dict[str, frozenset[str]] = {}
    for model in models:
        behind[model.name] = model.upstream.union(*(behind.get(t, ()) for t in model.upstream))
        _must_be_among(keys, model, model.upstream)
    for check in checks:
        _must_be_among(behind, check, [check.of])
        _must_be_among({check.of} | behind[check.of] | upstream_keys.keys(), check, check.upstream)
    return [_asset(m, [c for c in checks if c.of == m.name], keys) for m in models]


def _asset(
    model: Query, checks: Sequence[Check], keys: Mapping[str, dg.AssetKey]
) -> dg.AssetsDefinition:
    key = keys[model.name]
    reads = model.upstream.union(*(check.upstream for check in checks)) - {model.name}

    @dg.asset(
        key=key,
        deps=sorted({keys[table] for table in reads}),
        group_name="comparison",
        kinds={"duckdb", "sql"},
        pool="warehouse",
        code_version=model.code_version,
        automation_condition=EDITED,
        description=f"{model.description}\n\n```sql\n{model.text}\n```",
        metadata={"dagster/code_references": _code_reference(model)},
        check_specs=[
            dg.AssetCheckSpec(c.name, asset=key, description=c.description, blocking=True)
            for c in checks
        ],
    )
    def table(
        warehouse: dg.ResourceParam[Warehouse],
    ) -> Iterator[dg.AssetCheckResult | dg.MaterializeResult]:
        built = warehouse.build(model.name, model.text, {c.name: c.text for c in checks})
        for name, found in built.violations.items():
            yield _check_result(name, found)
        if not built.published:
            failed = [name for name, found in built.violations.items() if found.count]
            raise dg.Failure(
                f"{model.name} was not published, the table before it stays; "
                f"failed: {', '.join(failed)}",
                allow_retries=False,
            )
        yield dg.MaterializeResult(metadata=_metadata(model, warehouse, built.table, keys))

    return table


def _check_result(name: str, found: Sample) -> dg.AssetCheckResult:
    metadata: dict[str, Any] = {"violations": found.count}
    if found.count:
        metadata["examples"] = dg.MetadataValue.md(markdown(list(found.columns), found.rows))
    return dg.AssetCheckResult(check_name=name, passed=not found.count, metadata=metadata)


def _metadata(
    model: Query, warehouse: Warehouse, table: Sample, keys: Mapping[str, dg.AssetKey]
) -> dict[str, Any]:
    sources = lineage(model, warehouse.schemas())
    deps = {
        column: [dg.TableColumnDep(keys[table], source) for table, source in pairs]
        for column, pairs in sources.items()
    }
    made_of = [(c, ", ".join(f"{t}.{s}" for t, s in pairs)) for c, pairs in sources.items()]
    columns = [dg.TableColumn(name, type=kind) for name, kind in table.columns.items()]
    return {
        "dagster/row_count": table.count,
        "dagster/table_name": model.name,
        "dagster/column_schema": dg.TableSchema(columns),
        "dagster/column_lineage": dg.TableColumnLineage(deps),
        "lineage": dg.MetadataValue.md(markdown(["column", "made of"], made_of)),
        "preview": dg.MetadataValue.md(markdown(list(table.columns), table.rows)),
    }


def _code_reference(model: Query) -> dg.CodeReferencesMetadataValue:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)
        return dg.CodeReferencesMetadataValue(
            code_references=[dg.LocalFileCodeReference(file_path=str(model.path.absolute()))]
        )


def _must_be_among(known: Any, query: Query, tables: Any) -> None:
    for table in sorted(set(tables) - set(known)):
        raise SqlError(f"{query.path}: {table!r} is not among {', '.join(sorted(known))}")


def _parse(path: Path) -> tuple[str, Path, str, str, exp.Query]:
    """Name, path, text, description and tree of a file that holds one SELECT."""
    if not NAME.fullmatch(path.stem):
        raise SqlError(f"{path}: the name becomes a table's: lower case letters, digits and _")
    text = path.read_text()
    try:
        tokens = sqlglot.tokenize(text, DIALECT)
        parsed = sqlglot.parse(text, dialect=DIALECT)
    except sqlglot.ParseError as error:
        where = error.errors[0]
        raise SqlError(f"{path}:{where['line']}: {where['description']}") from None
    except sqlglot.TokenError as error:
        raise SqlError(f"{path}: {error}") from None
    runs = groupby(tokens, key=lambda token: token.token_type == TokenType.SEMICOLON)
    parts = [list(run) for semicolon, run in runs if not semicolon]
    trees = [tree for tree in parsed if tree is not None and not isinstance(tree, exp.Semicolon)]
    if len(parts) != 1 or not isinstance(trees[0], exp.Select | exp.SetOperation):
        line = parts[min(1, len(parts) - 1)][0].line if parts else 1
        raise SqlError(f"{path}:{line}: a file is one SELECT and nothing else")
    text = text[: parts[0][-1].end + 1]
    leading = takewhile(lambda line: line.startswith("--"), text.splitlines())
    description = "\n".join(line.removeprefix("--").strip() for line in leading)
    return path.stem, path, text, description, trees[0]
