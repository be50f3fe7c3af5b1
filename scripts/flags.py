"""A parser for the flags of a script beside the three: what it refuses is a UserError, one line."""

import argparse
from typing import NoReturn

from utils.errors import UserError


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
        flags = [action.option_strings[0] for action in shown if action.option_strings]
        raise UserError(f"{message}; flags: {', '.join(flags)}")
