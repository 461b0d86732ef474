"""Saving and loading packed models, and converting saved float ones."""

from lowbit.checkpoint import importers as importers
from lowbit.checkpoint.convert_folder import convert_folder
from lowbit.checkpoint.exporters import export
from lowbit.checkpoint.folder import load, save

__all__ = ["convert_folder", "export", "load", "save"]
