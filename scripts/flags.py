"""A parser for the flags of a script beside the three: what it refuses is a UserError, one line."""

import argparse
from typing import NoReturn

from utils.errors import UserError


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")
