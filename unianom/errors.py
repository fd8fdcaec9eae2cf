"""Errors meant for the user: one sentence that says what, where and what to do."""


class UnianomError(Exception):
    """Base of every error that a user can cause and mend. Jobs print it without a traceback."""


class OptionError(UnianomError):
    """An option has a wrong value or does not fit the others."""


class DataError(UnianomError):
    """A data source, shard set or score set is missing, unfinished or not what it claims to be."""


class WeightsError(UnianomError):
    """Backbone weights are missing or do not fit the backbone."""


class ModelError(UnianomError):
    """A model folder cannot be read, is damaged or does not fit this version."""


class ImageError(UnianomError):
    """One image cannot be used.

    Attributes:
        status: one of `unianom.data.schema.STATUSES` except "ok"; what the row of this image will carry.
    """

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """Both arguments, so that the error survives the way from a worker to the driver."""
        return type(self), (self.status, str(self))
