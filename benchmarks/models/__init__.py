"""Whole models: speed, accuracy, bytes on disk and in memory."""
