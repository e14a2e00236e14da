"""`raymill keys create|list|revoke`: API keys of the endpoint; the replicas know of a change within a second."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from raymill.jobs.cli.output import AsJson, emit, err, out, table
from raymill.jobs.cli.records import open_records
from raymill.runtime.api_keys import OPERATOR, PREFIX, ApiKey, Right, check_tenant, digest_of, new_key
from raymill.runtime.errors import SpecError, Usage
from raymill.runtime.expressions import duration_us

keys = typer.Typer(no_args_is_help=True)


@keys.command("create")
def create(
    tenant: Annotated[str, typer.Argument(help="Whose key it is; a tenant may have several.")],
    right: Annotated[list[Right] | None, typer.Option("--right", help="`predict` (if none is said), `manage`.")] = None,
    expires: Annotated[str, typer.Option(help="For how long it holds, e.g. 90d; absent: until it is revoked.")] = "",
    as_json: AsJson = False,
) -> None:
    """Make a key and print it, this once: what is kept of it is a digest."""
    if check_tenant(tenant) == OPERATOR:
        raise Usage(f"the tenant {OPERATOR!r} is raymill itself, whose key `raymill up --require-key` makes")
    key, now_s = new_key(), time.time()
    made = ApiKey(
        digest=digest_of(key),
        tenant=tenant,
        rights=tuple(sorted(set(right or [Right.PREDICT]))),
        created_s=now_s,
        expires_s=now_s + _seconds(expires) if expires else None,
    )
    with open_records(new=True) as (_, records):
        records.create_key(made)

    def human() -> None:
        out.print(key, soft_wrap=True)
        err.print(f"key {made.id} of {tenant}, which may {' and '.join(made.rights)}: it is not shown again")

    emit({**_told(made), "key": key}, as_json, human)


@keys.command("list")
def every(as_json: AsJson = False) -> None:
    """All keys there ever were; none of them can be had back from this."""
    with open_records(new=True) as (_, records):
        found = [_told(k) for k in records.api_keys()]

    def human() -> None:
        table("API keys", ["id", "tenant", "rights", "state", "created", "expires"], [_row(k) for k in found])

    emit(found, as_json, human)


@keys.command("revoke")
def revoke(
    key: Annotated[str, typer.Argument(help="Its id, or the key itself.")],
    reason: Annotated[str, typer.Option(help="Why, for the ledger.")] = "by hand",
    as_json: AsJson = False,
) -> None:
    """Have a key be worth nothing from now on, for good."""
    name = digest_of(key) if key.startswith(PREFIX) else key
    with open_records(new=True) as (_, records):
        revoked = records.revoke_key(name, reason)
    emit(_told(revoked), as_json, lambda: out.print(f"key {revoked.id} of {revoked.tenant} is revoked"))


def _seconds(text: str) -> float:
    try:
        seconds = duration_us(text) / 1e6
    except (ValueError, SpecError) as error:
        raise Usage(f"--expires is {text!r}: say for how long, e.g. 90d or 12h") from error
    if not 0 < seconds < 100 * 365 * 86_400:
        raise Usage(f"--expires is {text!r}: more than nothing and less than a hundred years")
    return seconds


def _told(key: ApiKey) -> dict[str, Any]:
    now_s = time.time()
    state = "revoked" if key.revoked_s is not None else "holds" if key.holds_at(now_s) else "expired"
    times = {"created": key.created_s, "expires": key.expires_s, "revoked": key.revoked_s}
    return {
        "id": key.id,
        "tenant": key.tenant,
        "rights": [str(r) for r in key.rights],
        "state": state,
        **{
            what: None if at is None else datetime.fromtimestamp(at, UTC).isoformat(" ", "seconds")
            for what, at in times.items()
        },
    }


def _row(told: dict[str, Any]) -> list[str]:
    created, expires = (at and at[:16] for at in (told["created"], told["expires"]))
    return [
        told["id"],
        told["tenant"],
        " ".join(told["rights"]),
        told["state"],
        created,
        expires or "never",
    ]
