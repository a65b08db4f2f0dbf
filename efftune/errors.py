"""The error for everything that a user can put right: one sentence that names the remedy."""


class EfftuneError(ValueError):
    pass
