"""The one exception for what a user can mend."""


class UserError(Exception):
    """A mistake in the input or the machine's state, not in the program.

    The message is one line: the bad value, then the valid choices or what to do.
    """
