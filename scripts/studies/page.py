"""PLACEHOLDER"""


def write_page(study, trials, settings, out):
    return ""
