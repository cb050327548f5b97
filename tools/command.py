"""What command lines share: types of flags, folders, and streams that may be closed or full."""
import argparse
import contextlib
import math
import os
import sys
from functools import partial
from pathlib import Path

from tools.files import InputError


def number(low, high=math.inf, kind=float, exclusive=False):
    """An argparse type: a finite number of `kind` in [low, high], or in (low, high]."""
    wanted = "a whole number" if kind is int else "a number"
    wanted += f" above {low}" if exclusive else f" from {low}"
    if high < math.inf:
        wanted += f" to {high}"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        inside = low <= value <= high and value < math.inf  # not so for nan
        if not inside or exclusive and value == low:
            raise argparse.ArgumentTypeError(f"must be {wanted}, not {text!r}")
        return value
    return parse


whole = partial(number, kind=int)


def utf8(text):
    """An argparse type: a text that can be written to files."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"is not UTF-8: {text!r}") from None
    return text


def make_folder(path):
    """Make a folder that can be written to -> its Path. Raises InputError."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; choose another folder") from None
    if not os.access(path, os.W_OK):
        raise InputError(f"{path}: not writable; choose another folder")
    return Path(path)


class Forgiving:
    """A text stream that drops what cannot be written: its reader is gone, or the disk is full."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def guard_streams():
    """Closed or full, stdout and stderr cost neither a file nor the exit code of finished work."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # None: closed
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Forgiving(stream))
