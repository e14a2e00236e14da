"""Every error raymill raises, as one tree; the HTTP code sits on the class.

    RaymillError                500  base of all
    ├── SpecError               422  the pipeline file or cluster.toml is wrong
    │   └── Exposed             422  the endpoint would be open to other hosts without a key or without TLS
    ├── ContractError           422  rows do not fit the declared source (a whole batch, not single rows)
    ├── RequestError            400  a request that can not be read
    │   ├── UnknownEntity       422  a required entity was never seen
    │   ├── UnknownModel        404
    │   ├── UnknownVersion      404
    │   ├── UnknownPrediction   404
    │   ├── UnknownFeature      404
    │   ├── UnknownRow          404  a quarantined row
    │   ├── UnknownKey          404  an API key's id
    │   ├── Usage               400  a wrong word on the command line
    │   ├── NoSuchPath          404
    │   ├── WrongMethod         405
    │   ├── TooSlow             408
    │   └── TooLarge            413
    ├── Unauthenticated         401  no API key, or none that holds
    ├── Forbidden               403  the key's rights do not reach so far
    │   └── Closed              403  this way in is not open to other hosts
    ├── Expired                 504  the request's own `timeout` was over before it was computed
    ├── Overloaded              429  the queue is full: come again
    ├── Unavailable             503  the endpoint or actor is not there (yet): come again
    ├── Conflict                409  the state does not allow it (promote what is live, a run that is running)
    ├── LeaseError              503  the pool can not grant it
    ├── TrainingError           500  the gang failed for good
    ├── ModelError              500  a model can not be loaded or answers nonsense
    │   ├── MissingPackage  500  the library of its kind is not installed
    │   └── DeadlyModel     500  its load ends the process
    ├── StoreError              500  lake, online store, ledger or registry are damaged or unreachable
    └── ClusterError            500  a node, port, disk or memory problem of this machine

Each takes exactly one string: an exception with more constructor arguments and no `__reduce__` comes back
from a Ray actor as `UnserializableException`, which no `except` of a caller matches. The message says what
happened, where, and what to do.
"""

from __future__ import annotations


class RaymillError(Exception):
    """Base of every error raymill raises on purpose."""

    http_status = 500
    remedy = "see `raymill doctor`"

    def __init__(self, message: str) -> None:
        super().__init__(message)

    @property
    def message(self) -> str:
        """What happened, where, and what to do."""
        return str(self.args[0])

    @property
    def code(self) -> str:
        """The error's name on the wire, e.g. `unknown_model`."""
        name = type(self).__name__
        return "".join("_" + c.lower() if c.isupper() else c for c in name).lstrip("_")


class SpecError(RaymillError):
    """The pipeline file or `cluster.toml` is wrong; nothing was started."""

    http_status = 422
    remedy = "mend the file; `raymill plan` checks it without starting anything"


class Exposed(SpecError):
    """The endpoint would be reachable from other hosts without a key, or without TLS; nothing was started."""

    remedy = 'docs/operations.md, "Beyond loopback"'


class ContractError(RaymillError):
    """A batch does not fit its declared source: a missing column, a wrong type, rows that are too old."""

    http_status = 422
    remedy = "send the columns and types that the source declares"


class RequestError(RaymillError):
    """A request that can not be read or does not fit the model."""

    http_status = 400
    remedy = "`GET /docs` of the endpoint shows the form of its requests"


class UnknownEntity(RequestError):
    """An entity of a view marked `required` was never seen."""

    http_status = 422
    remedy = "check the entity's spelling, or ingest its rows first"


class UnknownModel(RequestError):
    """No model of that name is served."""

    http_status = 404
    remedy = "`raymill models` lists them"


class UnknownVersion(RequestError):
    """The model has no such version."""

    http_status = 404
    remedy = "`raymill models` lists them"


class UnknownPrediction(RequestError):
    """No prediction with that id was logged."""

    http_status = 404
    remedy = "take the id from an answer of `/predict`"


class UnknownRow(RequestError):
    """No quarantined row has that id."""

    http_status = 404
    remedy = "`raymill quarantine list` shows the rows with their ids"


class UnknownKey(RequestError):
    """No API key has that id."""

    http_status = 404
    remedy = "`raymill keys list` shows the ids"


class UnknownFeature(RequestError):
    """No pipeline ever registered a feature of that name."""

    http_status = 404
    remedy = "`raymill features list` shows the features there are"


class TooLarge(RequestError):
    """The body or the batch is larger than the endpoint takes."""

    http_status = 413
    remedy = "split the rows over several requests"


class Usage(RequestError):
    """A wrong verb, option or argument."""

    remedy = "`raymill --help` lists the verbs, `raymill VERB --help` what a verb takes"


class NoSuchPath(RequestError):
    """Nothing is at this path."""

    http_status = 404
    remedy = "GET / lists the paths"


class WrongMethod(RequestError):
    """The path takes another method."""

    http_status = 405
    remedy = "GET / lists the paths with their methods"
    allow = ""
    """The method that it takes."""


class TooSlow(RequestError):
    """The request was not whole in time."""

    http_status = 408
    remedy = "send the request in one piece"


class Unauthenticated(RaymillError):
    """The request has no API key, or one that is unknown, revoked or expired."""

    http_status = 401
    remedy = "send `Authorization: Bearer rm_…`; `raymill keys create TENANT` on the endpoint's host makes a key"


class Forbidden(RaymillError):
    """Who asks is known and may not do this."""

    http_status = 403
    remedy = "`raymill keys list` shows each key's rights, `raymill keys create TENANT --right manage` gives another"


class Closed(Forbidden):
    """The request came a way that is not open to other hosts, whoever asks."""

    remedy = "call the address that `raymill status` shows; `raymill up --host ADDRESS` opens one to other hosts"


class Expired(RaymillError):
    """The answer was not there in the time that the request gives (header `timeout`): it was not computed."""

    http_status = 504
    remedy = "give more time, or send fewer rows"


class Overloaded(RaymillError):
    """The replica's queue is full, or too long for an answer in time."""

    http_status = 429
    remedy = "come again in a moment, with the same ids"
    retry_after_s = 1
    """Seconds after which to come again."""


class Unavailable(RaymillError):
    """The endpoint or actor is not there (yet)."""

    http_status = 503
    remedy = "come again in a moment; `raymill status` says what runs"


class Conflict(RaymillError):
    """The present state does not allow it."""

    http_status = 409
    remedy = "`raymill status` and `raymill models` show the present state"


class LeaseError(RaymillError):
    """The pool can not grant the lease."""

    http_status = 503
    remedy = "`raymill status` shows the queue and the reason"


class TrainingError(RaymillError):
    """The gang failed for good: fewer than `min_ranks` are left, or the loss is not finite."""


class ModelError(RaymillError):
    """A model can not be loaded, exported or run."""

    remedy = "mend the model and serve it as a new version; `raymill rollback MODEL` goes back to the one before"


class MissingPackage(ModelError):
    """The library that runs a model of this kind is not installed."""

    remedy = "`pip install 'raymill[models]'` on every host that serves"


class DeadlyModel(ModelError):
    """Loading the model has ended the process that did it: a crash in native code, or no memory left."""

    remedy = "mend the model, or give its host more memory, and register it as a new version"


class StoreError(RaymillError):
    """The lake, the online store, the ledger or the registry is damaged or unreachable."""


class ClusterError(RaymillError):
    """A node, port, disk or memory problem of this machine."""
