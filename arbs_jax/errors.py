"""Errors that are the user's to mend: the command line prints them in a line or two, without a traceback."""


class UserError(Exception):
    """A mistake in what was asked for; the message names the argument, both values, and what to do."""


class ConfigError(UserError):
    """Arguments that are out of range or contradict each other."""


class DataError(UserError):
    """Training or evaluation data that is missing, empty, too short or unreadable."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or belongs to another configuration."""


class StateError(UserError):
    """Ternary state whose leaves have a wrong name, dtype, shape or value."""
