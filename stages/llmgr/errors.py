"""The one exception for what the user can mend."""


class UserError(ValueError):
    """One sentence: what is wrong, the key or file, and how to mend it. Stages print it and exit with status 2."""


class WorkersFailed(Exception):
    """Workers that a stage started failed: what they said, and the exit status that says whose fault it is."""

    def __init__(self, said: str, status: int) -> None:
        super().__init__(said)
        self.status = status
