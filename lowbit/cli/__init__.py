"""The command `lowbit`."""

from lowbit.cli.command import main as main
