"""What is inside the shared library and the wheel: symbols, dependencies, GPU code, metadata."""

from __future__ import annotations

import fcntl
import functools
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

import cce_ext
from cce_ext import _load, info

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = _load.load()
FACTS = cce_ext.build_info()
SANITIZED = bool(FACTS.get("sanitizer"))

# ---- symbols and dependencies ----

# Symbols with a version come from glibc, libstdc++ or libgcc; nothing of theirs is named otherwise.
SYSTEM_VERSION = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_")
TORCH_C_ABI = re.compile(r"(aoti_torch_|torch_)\w+$")
# Weak, defined by the linker or the C runtime where they exist at all.
RUNTIME_HOOKS = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
SANITIZER_HOOKS = re.compile(r"__(asan|ubsan|sanitizer)_")


class Symbol(NamedTuple):
    name: str  # with its version, as in memcpy@GLIBC_2.14
    binding: str  # GLOBAL, WEAK or LOCAL


@functools.cache
def undefined_symbols() -> list[Symbol]:
    text = run("readelf", "-W", "--dyn-syms", str(LIBRARY))
    rows = (line.split() for line in text.splitlines() if " UND " in line)
    return [Symbol(row[7], row[4]) for row in rows if len(row) > 7]


@functools.cache
def dynamic_section() -> dict[str, list[str]]:
    """Tag (NEEDED, RUNPATH, ...) -> the values in brackets."""
    entries: dict[str, list[str]] = {}
    for tag, value in re.findall(r"\((\w+)\)[^\[\n]*\[(.*)\]", run("readelf", "-W", "-d", LIBRARY)):
        entries.setdefault(tag, []).append(value)
    return entries


def run(*command: str | os.PathLike[str], **options) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def is_allowed(symbol: Symbol) -> bool:
    name = symbol.name
    return bool(
        SYSTEM_VERSION.search(name)
        or TORCH_C_ABI.match(name)
        or name in RUNTIME_HOOKS
        or (SANITIZED and SANITIZER_HOOKS.match(name))
    )


def test_only_allowed_symbols_are_undefined() -> None:
    symbols = undefined_symbols()
    assert any(TORCH_C_ABI.match(s.name) for s in symbols), "the symbol table was not read"
    assert [s.name for s in symbols if not is_allowed(s)] == []


@pytest.mark.parametrize("prefix", ["Py", "_Py", "_ZN2at", "_ZN3c10", "_ZN5torch"])
def test_no_symbol_of_python_or_of_torchs_cpp_abi(prefix: str) -> None:
    assert [s.name for s in undefined_symbols() if s.name.startswith(prefix)] == []


def test_needed_libraries() -> None:
    needed = dynamic_section()["NEEDED"]
    assert "libtorch.so" in needed  # without it the current CUDA stream cannot be found
    unwanted = ("libtorch_cuda", "libc10_cuda", "libcudart", "libcuda", "libtorch_python")
    unwanted += ("libpython", "libc10.", "libgomp")
    assert [name for name in needed if name.startswith(unwanted)] == []


def test_no_absolute_search_path() -> None:
    paths = dynamic_section().get("RUNPATH", []) + dynamic_section().get("RPATH", [])
    assert set(paths) <= {"$ORIGIN"}


def test_exports_nothing_but_build_facts() -> None:
    text = run("readelf", "-W", "--dyn-syms", str(LIBRARY))
    rows = (line.split() for line in text.splitlines())
    defined = {row[7] for row in rows if len(row) > 7 and row[6].isdigit()}
    assert defined == {"cce_build_facts"}


# ---- loading ----


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def test_second_copy_is_refused(tmp_path: Path) -> None:
    copy = tmp_path / "libother.so"
    shutil.copy(LIBRARY, copy)
    result = python(
        "import os, torch\n"
        "torch.ops.load_library(os.environ['OTHER_COPY'])\n"
        "try:\n    import cce_ext\nexcept ImportError as error:\n    print(error)\n",
        OTHER_COPY=str(copy),
    )
    assert result.returncode == 0, result.stderr
    assert "already defined" in result.stdout
    assert str(LIBRARY) in result.stdout


def test_missing_library_says_what_to_do(tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere.so")
    result = python("import cce_ext", CCE_OPS_LIBRARY=missing)
    assert result.returncode == 1
    assert f"ImportError: $CCE_OPS_LIBRARY names {missing}" in result.stderr


def test_file_that_is_no_library_is_an_import_error(tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_text("not a library")
    result = python("import cce_ext", CCE_OPS_LIBRARY=str(broken))
    assert result.returncode == 1
    assert "ImportError" in result.stderr
    assert "rebuild" in result.stderr


def test_facts_need_no_python_module() -> None:
    code = (
        "import sys; sys.modules['cce_ext._C'] = None\n"
        "import cce_ext; print(cce_ext.build_info()['backends'])"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(FACTS["backends"])


def test_info_prints_every_backend() -> None:
    text = run(sys.executable, "-m", "cce_ext.info", cwd=ROOT)
    for name in ("cpu", "sm80", "sm90", "triton", "blocked"):
        assert re.search(rf"^{name}\s+(yes|no)\s+(yes|no)", text, re.MULTILINE), text
    assert str(LIBRARY) in text


def test_a_backend_that_is_not_available_says_why() -> None:
    listed = {backend.name: backend for backend in info.backends()}
    assert list(listed) == ["cpu", "sm80", "sm90", "triton", "blocked"]
    assert listed["cpu"] == ("cpu", True, True, "")
    for backend in listed.values():
        assert backend.available == (backend.reason == "")
        assert backend.compiled or not backend.available


# ---- wheel ----


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the sources, made with the compiled objects that are there already."""
    if not (ROOT / "setup.py").exists() or not (ROOT / "build" / "cmake").exists():
        pytest.skip("no build folder here: the sources would be compiled anew")
    folder = tmp_path_factory.mktemp("dist")
    with open(ROOT / "build" / "wheel.lock", "w") as lock:  # other workers use the same folder
        fcntl.flock(lock, fcntl.LOCK_EX)
        run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", folder, cwd=ROOT)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_contents(wheel: Path) -> None:
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert wheel.name.startswith(f"cce_ext-{cce_ext.__version__}-{tag}-{tag}-linux_")
    names = zipfile.ZipFile(wheel).namelist()
    package = {name for name in names if name.startswith("cce_ext/")}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "cce_ext").rglob("*.py")}
    assert {name for name in package if name.endswith(".py")} == sources
    compiled = sorted(Path(name).name for name in package - sources)
    assert [name.split(".")[0] for name in compiled] == ["_C", "libcce_ops"]
    assert compiled[1] == "libcce_ops.so"
    others = {name.split("/")[0] for name in names if name not in package}
    assert others == {f"cce_ext-{cce_ext.__version__}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_requires_the_floor_alone(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    requirements = re.findall(r"^Requires-Dist: (.*)$", archive.read(metadata).decode(), re.M)
    assert [r for r in requirements if "extra ==" not in r] == [f"torch>={FACTS['torch_target']}"]


def test_wheel_works_where_it_is_unpacked(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import torch, cce_ext\n"
        "loss = cce_ext.linear_cross_entropy(torch.randn(3, 4), torch.zeros(7, 4), "
        "torch.tensor([0, 1, 6]))\n"
        "print(cce_ext.__file__, round(loss.item(), 4))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    environment.pop("CCE_OPS_LIBRARY", None)
    text = run(sys.executable, "-c", code, cwd=tmp_path, env=environment)
    assert text.split() == [str(tmp_path / "cce_ext" / "__init__.py"), "1.9459"]  # log 7


# ---- GPU code ----

needs_cuda_build = pytest.mark.skipif(
    not FACTS.get("cuda_toolkit"), reason="a CPU-only build has no GPU code"
)


@functools.cache
def cuobjdump() -> str:
    """The cuobjdump of the newest source: PATH (the toolkit) or the triton package."""
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin")
    if found is None:
        triton = pytest.importorskip("triton", reason="no cuobjdump: no toolkit's, no triton")
        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return found


def architectures(kind: str) -> set[str]:
    """The architectures that FACTS promise; kind is real (machine code) or virtual (PTX)."""
    return {"sm_" + a.removesuffix(f"-{kind}") for a in FACTS["cuda_archs"] if a.endswith(kind)}


def has_kernels(folder: str, file: str) -> bool:
    return (ROOT / "csrc" / "cuda" / folder / file).exists()


@needs_cuda_build
def test_code_for_every_architecture() -> None:
    machine_code = set(re.findall(r"\.(sm_\w+)\.cubin", run(cuobjdump(), "--list-elf", LIBRARY)))
    ptx = set(re.findall(r"\.(sm_\w+)\.ptx", run(cuobjdump(), "--list-ptx", LIBRARY)))
    assert machine_code == architectures("real")
    assert ptx == architectures("virtual")
    if "CCE_CUDA_ARCHS" not in os.environ and has_kernels("sm80", "forward.cu"):
        assert machine_code >= {"sm_80", "sm_86", "sm_89", "sm_90"}
        assert ptx == {"sm_90"}


class Kernel(NamedTuple):
    arch: str
    name: str
    stack: int  # bytes
    local: int  # bytes


def kernels() -> list[Kernel]:
    found, arch = [], ""
    pattern = re.compile(
        r"arch = (\w+)|Function (\w+):\s+REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    )
    for match in pattern.finditer(run(cuobjdump(), "--dump-resource-usage", LIBRARY)):
        if match[1]:
            arch = match[1]
        else:
            found.append(Kernel(arch, match[2], int(match[3]), int(match[4])))
    return found


@needs_cuda_build
def test_mainloops_use_no_local_memory() -> None:
    mainloops = [kernel for kernel in kernels() if "mainloop" in kernel.name]
    seen = {(kernel.arch, "forward" in kernel.name) for kernel in mainloops}
    generic = architectures("real") - {"sm_90a"}
    if has_kernels("sm80", "forward.cu"):
        assert {(arch, True) for arch in generic} <= seen
    if has_kernels("sm80", "backward.cu"):
        assert {(arch, False) for arch in generic} <= seen
    if has_kernels("sm90", "forward.cu"):
        assert ("sm_90a", True) in seen
    assert [k for k in mainloops if k.stack or k.local] == []


# Matrix and copy instructions that a forward mainloop is about.
INSTRUCTIONS = {"sm80": ["HMMA.16816.F32", "LDGSTS"], "sm90": ["HGMMA", "UTMALDG"]}


@needs_cuda_build
@pytest.mark.parametrize(
    ("family", "arch"),
    [*(("sm80", arch) for arch in ("sm_80", "sm_86", "sm_89", "sm_90")), ("sm90", "sm_90a")],
)
def test_forward_uses_the_tensor_cores(family: str, arch: str) -> None:
    if not has_kernels(family, "forward.cu") or arch not in architectures("real"):
        pytest.skip(f"no {family} forward for {arch} in this build")
    text = run(cuobjdump(), "-sass", "-arch", arch, LIBRARY)
    bodies = dict(re.findall(r"Function : (\w+)(.*?)(?=Function :|\Z)", text, re.S))
    forwards = {n: body for n, body in bodies.items() if "forward_mainloop" in n and family in n}
    compiled = 0
    for name, body in forwards.items():
        # The last numbers of an sm80 tile: from which chip on and before which it is used. For others it is empty.
        used = re.search(r"ConfigI\w*?Li(\d+)ELi(\d+)EEE", name)
        if used and not int(used[1]) <= int(arch.strip("sm_a")) < int(used[2]):
            assert "HMMA" not in body, f"{name} is compiled for chips that never use it"
            continue
        missing = [i for i in INSTRUCTIONS[family] if i not in body]
        assert not missing, f"{name} has no {missing}"
        compiled += 1
    assert compiled
