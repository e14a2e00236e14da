"""`raymill features …`: which there are, who uses them, what their values are like, whether serving agrees."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raymill.jobs.cli.output import AsJson, emit, out, table
from raymill.jobs.cli.records import open_records

if TYPE_CHECKING:
    from raymill.actors.feature_readings import FeatureReadings
    from raymill.actors.lakes import Lakes

features = typer.Typer(no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="<view>.<feature>")]
Model = Annotated[str | None, typer.Argument(help="Only this model.")]


@contextmanager
def _readings() -> Iterator[tuple[Any, Lakes, FeatureReadings]]:
    """Records, lakes, and what may be read of features; errors as `open_records`."""
    with open_records() as (home, records):
        from raymill.actors.feature_readings import FeatureReadings
        from raymill.actors.lakes import Lakes

        lakes = Lakes(home, records.events)
        yield records, lakes, FeatureReadings(records, lakes)


@features.command("list")
def list_(as_json: AsJson = False) -> None:
    """Every feature that a pipeline has."""
    with _readings() as (*_, readings):
        found = readings.features({})
    emit(found, as_json, lambda: _catalogue(found))


@features.command()
def search(
    text: Annotated[str, typer.Argument(help="Stands in name, description or tags.")] = "",
    tag: Annotated[str, typer.Option(help="One of its tags.")] = "",
    owner: Annotated[str, typer.Option(help="Its owner.")] = "",
    column: Annotated[str, typer.Option(help="A source column that it stands on, e.g. flights.arr_delay.")] = "",
    as_json: AsJson = False,
) -> None:
    """Features for which all that is given holds."""
    with _readings() as (*_, readings):
        found = readings.features({"text": text, "tag": tag, "owner": owner, "column": column})
    emit(found, as_json, lambda: _catalogue(found))


@features.command()
def show(name: Name, as_json: AsJson = False) -> None:
    """Every version of a feature: definition, columns, users, statistics."""
    with _readings() as (*_, readings):
        found = readings.features({"name": name})

    def human() -> None:
        for version in found:
            told = {k: v for k, v in version.items() if k not in ("statistics", "columns", "models", "registered_s")}
            told["columns"] = ", ".join(f"{c['column']} ({c['role']})" for c in version["columns"])
            told["models"] = ", ".join(f"{m['model']}/{m['version']} {m['stage']}" for m in version["models"])
            for kind, values in version["statistics"].items():
                told[kind] = _statistics(values)
            shown = [[k, ", ".join(v) if isinstance(v, list | tuple) else v] for k, v in told.items() if v]
            table(name, ["", f"version {version['version']}"], shown)

    emit(found, as_json, human)


@features.command()
def stats(
    name: Annotated[str | None, typer.Argument(help="Only this feature.")] = None, as_json: AsJson = False
) -> None:
    """Statistics of each feature's version: in the training set, and as it was served."""
    with _readings() as (*_, readings):
        names = [name] if name else list(dict.fromkeys(f["name"] for f in readings.features({})))
        versions = [v for n in names for v in readings.features({"name": n})]
        found = [
            {"name": v["name"], "version": v["version"], **v["statistics"]}
            for v in versions
            if any(v["statistics"].values())
        ]

    def human() -> None:
        rows = [
            [v["name"], v["version"][:8], kind, *_figures(v[kind])]
            for v in found
            for kind in ("training", "online")
            if v[kind]
        ]
        columns = ["feature", "version", "of", "rows", "null", "unseen", "mean", "std", "least", "median", "greatest"]
        table("statistics", columns, rows)

    emit(found, as_json, human)


@features.command()
def lineage(
    column: Annotated[
        str | None, typer.Option(help="Source column: what stands on it, e.g. flights.arr_delay.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model: what its versions stand on.")] = None,
    version: Annotated[int | None, typer.Option(help="Only this version of the model.")] = None,
    as_json: AsJson = False,
) -> None:
    """From a source column to features and models, or from a model to features and columns."""
    given = {"column": column, "model": model, "version": version}
    with _readings() as (*_, readings):
        found = readings.lineage({k: str(v) for k, v in given.items() if v is not None})

    def human() -> None:
        if column is None:
            rows = [
                [f"{v['model']}/{v['version']}", v["stage"], len(v["features"]), ", ".join(v["columns"])] for v in found
            ]
            table(f"what {model} stands on", ["version", "stage", "features", "columns"], rows)
            return
        rows = [
            [f["name"], f["version"][:8], ", ".join(f["roles"]), ", ".join(f["pipelines"]), ", ".join(f["answering"])]
            for f in found["features"]
        ]
        table(f"what stands on {column}", ["feature", "version", "as", "pipelines", "live in"], rows)
        for label in found["labels"]:
            out.print(f"label    {label['label']} of {label['pipeline']} reads it")
        out.print(f"breaks   {', '.join(found['breaks']) or 'no live version'}")

    emit(found, as_json, human)


@features.command()
def deprecate(
    name: Name,
    reason: Annotated[str, typer.Option(help="Why it is not to be used.")] = "",
    replacement: Annotated[str, typer.Option(help="Feature to use instead.")] = "",
    version: Annotated[str, typer.Option(help="Content hash of the only version that is meant.")] = "",
    undo: Annotated[bool, typer.Option("--undo", help="It may be used again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say that a feature is not to be used any more; who uses it is named."""
    from raymill.runtime import feature_registration
    from raymill.runtime.errors import Usage

    if not undo and not reason:
        raise Usage("say why: `raymill features deprecate NAME --reason '…' [--replacement OTHER]`")
    with open_records() as (_, records):
        if undo:
            meant = feature_registration.restore(records, name)
        else:
            meant = feature_registration.deprecate(
                records, name, reason=reason, replacement=replacement, version=version
            )
    found = [v.to_json() for v in meant]

    def human() -> None:
        out.print(f"{name} {'may be used again' if undo else f'is deprecated: {reason}'}")
        for one in found:
            users = [f"pipeline {p}" for p in one["pipelines"]] + [f"version {m}" for m in one["answering"]]
            out.print(f"version {one['version']} is used by {', '.join(users) or 'nobody'}")

    emit(found, as_json, human)


@features.command()
def freshness(
    model: Model = None,
    at: Annotated[str | None, typer.Option(help="Moment, ISO-8601, or `now`; absent: when it was last asked.")] = None,
    as_json: AsJson = False,
) -> None:
    """Age of the newest event of every source in the lake, and of every view online."""
    query = {"model": model, "at": at}
    with _readings() as (*_, readings):
        found = readings.freshness({k: v for k, v in query.items() if v is not None})

    def human() -> None:
        for one in found:
            rows = [["lake", s["source"], _day(s["newest_at"]), _age(s["age_s"]), "", ""] for s in one["sources"]]
            for v in one["views"]:
                late = "all expired" if v["expired"] else ""
                rows.append(["online", v["view"], _day(v["newest_at"]), _age(v["age_s"]), _age(v["behind_s"]), late])
            title = f"{one['model']} at {_day(one['at'])}"
            table(title, ["where", "source or view", "newest event", "age", "behind the lake", ""], rows)

    emit(found, as_json, human)


@features.command()
def consistency(
    model: Model = None,
    check: Annotated[bool, typer.Option("--check", help="Recompute a sample now; else the checks so far.")] = False,
    rows: Annotated[int, typer.Option(help="Served rows of the sample.")] = 2_000,
    as_json: AsJson = False,
) -> None:
    """Whether what was served is what the lake gives; with --check the exit code of an alarm is 3."""
    with _readings() as (records, lakes, readings):
        if check:
            from raymill.actors.recompute import Recompute

            checks = {n: Recompute(lakes.of(n), records, lakes.places(n).online) for n in readings.trained(model)}
            found = [recompute.check(name, rows=rows).to_json() for name, recompute in checks.items()]
        else:
            found = readings.consistency({} if model is None else {"model": model})

    def human() -> None:
        for one in found:
            out.print(f"{one['model']}  {'ALARM' if one['alert'] else 'sound'}  {one['reason']}")
            for feature in one["features"]:
                out.print(f"  {feature['feature']}: {feature['why']}")

    emit(found, as_json, human)
    if check and any(one["alert"] for one in found):
        raise typer.Exit(3)


@features.command()
def register(
    pipeline: Annotated[Path, typer.Argument(help="The pipeline file.")],
    as_json: AsJson = False,
) -> None:
    """Register a pipeline's features without running it; `run` does it by itself."""
    from raymill.jobs import pipeline_file
    from raymill.runtime import feature_registration

    declared = pipeline_file.load(pipeline)
    with open_records(new=True) as (_, records):
        warnings = feature_registration.register(records, declared)
    found = {"pipeline": declared.name, "features": declared.feature_hashes, "warnings": warnings}

    def human() -> None:
        out.print(f"{declared.name}: {len(declared.feature_hashes)} features")
        for warning in warnings:
            out.print(f"warning: {warning}")

    emit(found, as_json, human)


def _catalogue(found: list[dict[str, Any]]) -> None:
    rows = [
        [
            v["name"],
            v["version"][:8],
            v["expression"],
            v["unit"],
            v["owner"],
            ", ".join(v["tags"]),
            ", ".join(v["answering"]),
            "deprecated" if v["deprecated"] else "sensitive" if v["sensitive"] else "",
        ]
        for v in found
    ]
    table("features", ["feature", "version", "definition", "unit", "owner", "tags", "live in", ""], rows)


def _statistics(values: dict[str, Any] | None) -> str:
    if values is None:
        return ""
    names = ("rows", "null", "unseen", "mean", "std", "least", "median", "greatest")
    return ", ".join(f"{n} {v}" for n, v in zip(names, _figures(values), strict=True) if v)


def _figures(values: dict[str, Any]) -> list[str]:
    """rows, null share, unseen share, mean, std, least, median and greatest value."""
    quantiles = values["quantiles"] or [None] * 11
    shares = [
        f"{values['null_share']:.2%}",
        "" if values.get("unseen_share") is None else f"{values['unseen_share']:.2%}",
    ]
    numbers = [values["mean"], values["std"], quantiles[0], quantiles[5], quantiles[-1]]
    return [f"{values['rows']:,}", *shares, *("" if v is None else f"{v:.4g}" for v in numbers)]


def _day(at: int | None) -> str:
    return "" if at is None else datetime.fromtimestamp(at / 1e6, UTC).isoformat(sep=" ", timespec="seconds")[:19]


def _age(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
