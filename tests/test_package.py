"""The package as it is installed: the wheel, its stable ABI, its names."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lowbit
from lowbit.backends import registry
from lowbit.backends.cpu import native

ROOT = Path(__file__).resolve().parents[1]
needs_library = pytest.mark.skipif(registry.why_unavailable("cpu") is not None, reason="no compiled kernels")
needs_source = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not run from a source checkout")


def test_public_names_have_docstrings():
    for name in lowbit.__all__:
        documented = getattr(lowbit, name)
        assert documented.__doc__, name
        assert "Attributes" in documented.__doc__ or len(documented.__doc__) > 30, name


@needs_library
def test_the_library_uses_only_torchs_stable_abi():
    audit = Path(sys.executable).with_name("torch-abi-audit")
    if not audit.is_file():
        pytest.skip("torch-abi-audit is not installed")
    done = subprocess.run([audit, "--check", "both", native.path()], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "STABLE" in done.stdout and "Min torch:   2.10" in done.stdout


def run_in(target: Path, code: str) -> subprocess.CompletedProcess:
    """Python that imports the lowbit unpacked in ``target``, from another folder than the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(target), "PYTHONNOUSERSITE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=target, capture_output=True, text=True, timeout=120
    )


USE = """
import torch, lowbit
model = lowbit.convert(torch.nn.Sequential(torch.nn.Linear(64, 32)), lowbit.Packed(bits=4, group_size=32))
print(lowbit.__file__, lowbit.dispatch.active_backend(), tuple(model(torch.randn(2, 64)).shape))
"""


@needs_source
@pytest.mark.parametrize("native_build", [True, False], ids=["compiled", "pure Python"])
def test_the_wheel_works(tmp_path, native_build):
    if native_build and registry.why_unavailable("cpu"):
        pytest.skip("no compiler here")
    if importlib.util.find_spec("setuptools") is None or importlib.util.find_spec("wheel") is None:
        pytest.skip("setuptools and wheel are needed to build")
    build = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-q"]
    environment = {**os.environ, "LOWBIT_NO_NATIVE": "0" if native_build else "1"}
    source = tmp_path / "source"  # building must not touch the checkout
    names = ["csrc", "lowbit", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"]
    names += ["build/native"] if (ROOT / "build/native").is_dir() else []  # ninja compiles what is not in there
    subprocess.run(["cp", "-a", "--parents", *names, str(source.mkdir() or source)], cwd=ROOT, check=True)
    for built in source.glob("lowbit/*.so"):
        built.unlink()
    done = subprocess.run(
        [*build, "-w", str(tmp_path), str(source)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert ("-cp310-abi3-" if native_build else "-py3-none-any.") in wheel.name
    target = tmp_path / "target"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    assert (target / "lowbit" / "py.typed").is_file()
    used = run_in(target, USE)
    assert used.returncode == 0, used.stderr
    where, backend, *shape = used.stdout.split(" ", 2)
    assert Path(where).is_relative_to(target) and shape == ["(2, 32)\n"]
    assert backend == ("cpu" if native_build else "reference")
    assert ("slow torch reference" in used.stderr) is not native_build
