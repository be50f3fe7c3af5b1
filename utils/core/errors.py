"""The one exception for everything a user can cause and cure."""


class UserError(Exception):
    """A mistake in the input or the machine's state, not in the program.

    The message is one line: the bad value, then the valid choices or what to do.
    """
