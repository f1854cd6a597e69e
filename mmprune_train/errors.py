"""The exceptions whose message says all: what is wrong and how to mend it. They are told without a traceback."""


class UserError(ValueError):
    """Wrong input (config, data, checkpoint). The message names the key, file or sample and the remedy; exit code 2."""


class NotHere(UserError):
    """Weights or data that are not on this machine yet, and may be fetched."""


class NotFinite(ArithmeticError):
    """NaN or infinity where training, a model that is saved, or an answer would go on with it. The message names where,
    what is kept and the remedy; exit code 1."""
