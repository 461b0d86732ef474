"""The package as it is installed: the wheel, its stable ABI, its names."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lowbit
from benchmarks.tools import runtimes
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


@needs_library
@pytest.mark.parametrize("path", [native.path(), native.path().with_name("liblowbit_cuda.so")], ids=lambda p: p.name)
def test_the_libraries_run_on_manylinux_2_28(path):
    if not path.is_file():
        pytest.skip(f"there is no {path.name}")
    assert runtimes.asked_for(path) and not runtimes.too_new(path)


def run_in(target: Path, code: str, *others: Path) -> subprocess.CompletedProcess:
    """Python that imports the lowbit in ``target``, from another folder than the checkout."""
    path = os.pathsep.join(map(str, (target, *others)))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONNOUSERSITE": "1"}
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
    names = ["csrc", "lowbit", "lowbit_vllm.py", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"]
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
    assert {path.name for path in target.iterdir()} == {
        "lowbit", "lowbit_vllm.py", f"lowbit-{lowbit.__version__}.dist-info"
    }  # fmt: skip
    entry_points = target / f"lowbit-{lowbit.__version__}.dist-info" / "entry_points.txt"
    assert "[vllm.general_plugins]\nlowbit = lowbit_vllm:register" in entry_points.read_text()
    assert not (target / "lowbit" / "testing").exists()
    used = run_in(target, USE)
    assert used.returncode == 0, used.stderr
    where, backend, *shape = used.stdout.split(" ", 2)
    assert Path(where).is_relative_to(target) and shape == ["(2, 32)\n"]
    assert backend == ("cpu" if native_build else "reference")
    assert ("slow torch reference" in used.stderr) is not native_build


def setup_py(folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess:
    """setup.py where the modules in ``folder`` come before installed ones."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "LOWBIT_NO_NATIVE": "0", **variables}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *command], env=environment, cwd=ROOT, capture_output=True, text=True
    )


@needs_source
@pytest.mark.parametrize(
    ("torch", "variables", "said"),
    [
        ("raise ImportError", {}, "build isolation"),
        ("__version__ = '2.9.1+cpu'", {}, "torch >= 2.10 is needed: found 2.9.1+cpu"),
        ("__version__ = '2.10.0'", {"PATH": "", "CXX": ""}, "no C++ compiler"),
    ],
    ids=["no torch", "old torch", "no compiler"],
)
def test_a_build_without_what_it_needs_fails_with_the_remedy(tmp_path, torch, variables, said):
    (tmp_path / "torch.py").write_text(torch)
    folders = ["--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    done = setup_py(tmp_path, "build_ext", *folders, **variables)
    assert done.returncode != 0
    assert said in done.stderr and "LOWBIT_NO_NATIVE=1" in done.stderr, done.stderr
    assert ("--no-build-isolation" in done.stderr) is (torch == "raise ImportError")


@needs_source
def test_what_needs_no_kernels_needs_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError")
    assert setup_py(tmp_path, "egg_info", "--egg-base", str(tmp_path)).returncode == 0
    folders = ["--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    assert setup_py(tmp_path, "build_ext", *folders, LOWBIT_NO_NATIVE="1").returncode == 0


@needs_library
@needs_source
def test_a_clone_runs_the_library_of_an_installation_from_the_same_sources(tmp_path):
    clone, installed = tmp_path / "clone", tmp_path / "site-packages"
    shutil.copytree(ROOT / "lowbit", clone / "lowbit", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(clone / "lowbit", installed / "lowbit")
    shutil.copy(native.path(), installed / "lowbit" / "_C.abi3.so")
    description = installed / f"lowbit-{lowbit.__version__}.dist-info" / "METADATA"
    description.parent.mkdir()
    description.write_text(f"Metadata-Version: 2.1\nName: lowbit\nVersion: {lowbit.__version__}\n")
    used = run_in(clone, USE, installed)
    where, backend, _ = used.stdout.split(" ", 2)
    assert Path(where).is_relative_to(clone) and backend == "cpu" and not used.stderr

    with (clone / "lowbit" / "packed" / "op.py").open("a") as file:
        file.write("# another schema\n")
    used = run_in(clone, USE, installed)
    assert used.stdout.split(" ", 2)[1] == "reference"
    (line,) = [line for line in used.stderr.splitlines() if "slow torch reference" in line]
    assert "belongs to other sources" in line and "pip install -e . --no-build-isolation" in line
