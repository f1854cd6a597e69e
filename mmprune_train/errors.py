"""The one exception that means: the user's input is wrong, and this line says how to mend it."""


class UserError(ValueError):
    """Wrong input (config, data, checkpoint). The message names the key, file or sample and the remedy; exit code 2."""


class NotHere(UserError):
    """Weights or data that are not on this machine yet, and may be fetched."""
