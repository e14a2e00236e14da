"""Estimators of scikit-learn as programs, from the archive that `skops.io.dump` writes: types by name, no pickle.

Only scikit-learn's own types are trusted, and those that the operator named when the file was registered.
"""

from __future__ import annotations

import warnings
from typing import Any

from raymill.actors import envelope
from raymill.actors.model_files import ENVELOPE, F32, Data, Kind, Loaded, fitting
from raymill.runtime.errors import ModelError

_OWN = "sklearn."


def load(data: Data) -> Loaded:
    """The program of an archive, or of an envelope around one: [rows, n] float32 → probability or value.

    A binary classifier answers with the probability of its second class, one of k > 2 with those of all `classes_`.

    Raises:
        ModelError: the bytes are no such archive, hold types that nobody trusts, or a classifier without
            probabilities.
    """
    import skops.io

    sealed = envelope.unpack(data) if bytes(data[: len(ENVELOPE)]) == ENVELOPE else None
    archive = bytes(data if sealed is None else sealed.payload)
    trusted = () if sealed is None else sealed.trusted
    try:
        strange = skops.io.get_untrusted_types(data=archive)
        _refuse(strange, trusted)
        estimator = skops.io.loads(archive, trusted=strange)
    except ModelError:
        raise
    except Exception as err:  # a damaged archive raises dozens of kinds
        raise ModelError(f"{len(archive)} bytes are no archive of skops ({type(err).__name__}: {err})") from err
    warnings.filterwarnings("ignore", message="X does not have valid feature names")  # rows come as plain numbers
    names = tuple(map(str, getattr(estimator, "feature_names_in_", ())))
    columns = getattr(estimator, "n_features_in_", None)
    if "n_jobs" in getattr(estimator, "get_params", dict)():
        estimator.set_params(n_jobs=1)  # replicas share their cores with everything else
    return Loaded(kind=Kind.SKLEARN, run=fitting(_run_of(estimator), columns), columns=columns, names=names)


def _refuse(strange: list[str], trusted: tuple[str, ...]) -> None:
    unknown = [name for name in strange if not name.startswith(_OWN) and name not in trusted]
    if unknown:
        raise ModelError(
            f"the archive holds types that nobody trusts: {', '.join(unknown)}; if you do, name them: "
            + " ".join(f"--trust {name}" for name in unknown)
        )


def _run_of(estimator: Any) -> Any:
    if not hasattr(estimator, "predict"):
        raise ModelError(f"{type(estimator).__name__} predicts nothing: save the fitted estimator")
    classes = getattr(estimator, "classes_", None)
    if classes is None:
        return estimator.predict
    if isinstance(classes, list):
        raise ModelError(
            f"{type(estimator).__name__} has {len(classes)} targets of classes: save one estimator a target"
        )
    if len(classes) < 2 or not hasattr(estimator, "predict_proba"):
        raise ModelError(
            f"{type(estimator).__name__} knows {len(classes)} classes"
            f"{'' if hasattr(estimator, 'predict_proba') else ' and no probabilities'}: the probabilities of two or "
            "more are served"
        )
    if len(classes) > 2:
        return estimator.predict_proba

    def probability(x: F32) -> Any:
        return estimator.predict_proba(x)[:, 1]

    return probability
