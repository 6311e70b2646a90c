"""The one exception for what the user can mend."""


class UserError(ValueError):
    """One sentence: what is wrong, the key or file, and how to mend it. Stages print it and exit with status 2."""
