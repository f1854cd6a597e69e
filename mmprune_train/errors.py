"""The exceptions whose message says all: what is wrong and how to mend it. They are told without a traceback."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Wrong input (config, data, checkpoint). The message names the key, file or sample and the remedy; exit code 2."""


class NotHere(UserError):
    """Weights or data that are not on this machine yet, and may be fetched."""


class NotFinite(ArithmeticError):
    """NaN or infinity where training, a model that is saved, or an answer would go on with it. The message names where,
    what is kept and the remedy; exit code 1."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the most similar known word, or an empty string."""
    found = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""


def unknown_name(what: str, word: str, known: Iterable[str]) -> str:
    """`knee=kneedl: there is no such option; did you mean kneedle? (one of ...)`, for any closed list of names."""
    names = list(known)
    return f"{what}={word}: there is no such option{nearest(word, names)} (one of {', '.join(names)})"
