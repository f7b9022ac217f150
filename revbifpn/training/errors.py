"""What can go wrong, and the exit code that a scheduler sees: those of ``sysexits.h``."""

from __future__ import annotations


class TrainingError(Exception):
    """A run cannot go on; the message names the file or option, what came, and the remedy."""

    exit_code = 1


class OptionError(TrainingError):
    """Options that do not go together, or do not fit the checkpoint that is resumed."""

    exit_code = 2


class DataError(TrainingError):
    """An image, a label or a folder that cannot be trained on."""

    exit_code = 65


class SaveError(TrainingError):
    """A file could not be written; what was saved before is whole."""

    exit_code = 74


class Stopped(TrainingError):
    """SIGTERM came: the run is saved, and the same command with ``--resume`` goes on."""

    exit_code = 75
