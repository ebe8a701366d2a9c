"""Builds the two shared objects of cce_ext through CMake and puts them into the package.

Environment: CCE_WITH_CUDA=0|1 forces the CUDA kernels off or on, CCE_CUDA_ARCHS shortens their
architecture list, CCE_SANITIZE=asan|ubsan, CMAKE_BUILD_TYPE, CMAKE_ARGS and
CMAKE_BUILD_PARALLEL_LEVEL do what they say.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
OPS_LIBRARY = "cce_ext.libcce_ops"
FACTS_MODULE = "cce_ext._C"


def find_tool(name: str) -> str:
    """The executable `name` of the PyPI package of that name if installed, else from PATH."""
    spec = importlib.util.find_spec(name)
    if spec and spec.submodule_search_locations:
        for folder in spec.submodule_search_locations:
            for candidate in (Path(folder) / "data" / "bin" / name, Path(folder) / "bin" / name):
                if candidate.is_file():
                    return str(candidate)
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if path is None:
        raise RuntimeError(f"{name} is needed to build cce_ext: pip install {name}")
    return path


def torch_is_here_to_stay() -> bool:
    """False in an isolated build, whose torch is gone when the build ends."""
    spec = importlib.util.find_spec("torch")
    environment = Path(sys.prefix).resolve()
    return bool(spec and spec.origin and environment in Path(spec.origin).resolve().parents)


class FreshBuildPy(build_py):
    """Starts from an empty folder: a file deleted since the last build stays out of the wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Runs CMake once and copies its results to where setuptools wants each extension."""

    def get_ext_filename(self, fullname: str) -> str:
        # libcce_ops.so serves every Python: no ABI tag. setuptools asks with and without package.
        if fullname.rpartition(".")[2] == OPS_LIBRARY.rpartition(".")[2]:
            return str(Path(*fullname.split("."))) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        # An isolated build must not spoil the developer's folder with paths that vanish.
        self.cmake_dir = ROOT / "build" / ("cmake" if torch_is_here_to_stay() else "cmake-isolated")
        self.run_cmake()
        super().build_extensions()

    def run_cmake(self) -> None:
        cmake = find_tool("cmake")
        options = {
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            "CMAKE_BUILD_TYPE": os.environ.get("CMAKE_BUILD_TYPE", "Release"),
            "Python_EXECUTABLE": sys.executable,
            "CCE_WITH_CUDA": os.environ.get("CCE_WITH_CUDA", "auto"),
            "CCE_SANITIZE": os.environ.get("CCE_SANITIZE", ""),
        }
        if "CCE_CUDA_ARCHS" in os.environ:
            options["CCE_CUDA_ARCHS"] = os.environ["CCE_CUDA_ARCHS"]
        configure = [cmake, "-S", str(ROOT), "-B", str(self.cmake_dir), "-G", "Ninja"]
        configure += [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run(configure + shlex.split(os.environ.get("CMAKE_ARGS", "")), check=True)
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
        subprocess.run([cmake, "--build", str(self.cmake_dir), "--parallel", jobs], check=True)

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # A new file, not new bytes in the old one: a process may have the old one mapped.
        target.unlink(missing_ok=True)
        shutil.copy2(self.cmake_dir / target.name, target)


setup(
    ext_modules=[Extension(OPS_LIBRARY, sources=[]), Extension(FACTS_MODULE, sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": FreshBuildPy},
)
