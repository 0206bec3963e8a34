"""Processes that scripts start: which still run, and where Ray's clusters keep their files."""

import re

import psutil


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process still runs."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def folders_of_ray(process: psutil.Process) -> set[str]:
    """Return the folders of clusters that samx has started, as a process names them."""
    return set(re.findall(r"(?:/\w+)*/samx-\w+", " ".join(process.cmdline())))
