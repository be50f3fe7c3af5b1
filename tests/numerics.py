"""How far numbers are from others, for several test files."""


def relative_error(value, reference):
    return ((value - reference).norm() / reference.norm()).item()
