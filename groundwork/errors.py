"""The errors a user can cause, each with the exit code that the command ends with.

A message is one sentence that names the file or option, the value found, the value wanted, and what to do.
"""


class ExpertSpeculationError(Exception):
    """Failed while running."""

    exit_code = 1


class ConfigurationError(ExpertSpeculationError):
    """Wrong usage, configuration or input: nothing was done, and the same call would fail again."""

    exit_code = 2


class IncompleteError(ExpertSpeculationError):
    """Finished, but something that was asked for was not reached, or verification found faults."""

    exit_code = 3
