"""The one exception that users are meant to see: a clear sentence, printed without a traceback by the command."""


class AttnlabError(Exception):
    """Something the user can mend; the message says what was given, what was expected and what to do."""


class UnsupportedModelError(AttnlabError):
    """The model's attention cannot be captured; the message names the model and the reason."""


class DataError(AttnlabError):
    """The texts or token ids cannot be read or do not suit the model."""


class RunFolderError(AttnlabError):
    """The output folder belongs to another run, is damaged, or cannot be written."""


class AttnlabWarning(UserWarning):
    """Something the user should know that does not stop the work: sequences cut, an analysis left out."""
