"""Where there is no GPU, Triton kernels run in the interpreter; and one thread per process: the tests run side by side,
and small tensors on many threads mostly wait."""

import importlib.util
import os

import pytest
import torch

from lowbit.testing import verdicts

torch.set_num_threads(1)
if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1":
    from lowbit.testing import interpreter

    interpreter.install()


def pytest_addoption(parser: pytest.Parser) -> None:
    verdicts.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(verdicts.Verdicts(config), "verdicts")
