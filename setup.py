"""The compiled half of the package. Everything that can be said as data stands in pyproject.toml.

Rules:
- Every file that a build reads is a source or in `depends`: what is in neither is missing from the sdist.
- One wheel for every Python from 3.11 on: both extensions keep to the stable ABI (cp311-abi3).
- Assertions stay on: Python's own flags carry -DNDEBUG (and -fwrapv, which hides overflows from UBSan).
- The C that Cython and cffi generate goes below build/, never beside its source.
- MIRRORPAIR_SANITIZE=address,undefined builds both extensions under these sanitizers, in a folder of their own:
  what was built otherwise would be taken for up to date.
"""

import os
import subprocess
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist
from setuptools.errors import SetupError

SANITIZERS = os.environ.get("MIRRORPAIR_SANITIZE")
STABLE_ABI = ("Py_LIMITED_API", "0x030B0000")
WARNINGS = ["-Wall", "-Wextra"]
# Left out of the sdist by setuptools, which knows only tests/test*.py; and what a tree holds besides sources.
EXTRA_TREES = ("tests", "bench", ".ci")
NO_SOURCE = {"__pycache__", ".pytest_cache", ".hypothesis", ".benchmarks", "results"}


def compile_flags() -> tuple[list[str], list[str]]:
    """What the compiler and the linker are told."""
    compile_args = ["-std=c11", "-O3", *WARNINGS, "-fvisibility=hidden", "-UNDEBUG", "-pthread"]
    link_args = ["-pthread"]
    if SANITIZERS:
        compile_args += [f"-fsanitize={SANITIZERS}", "-fno-wrapv", "-fno-omit-frame-pointer", "-g", "-O1"]
        link_args.append(f"-fsanitize={SANITIZERS}")
    return compile_args, link_args


class BuildExt(build_ext):
    """Gives every extension (cffi's too) the same flags, and looks for what cannot be installed by pip."""

    def build_extensions(self) -> None:
        compile_args, link_args = compile_flags()
        for extension in self.extensions:
            extension.extra_compile_args += compile_args
            extension.extra_link_args += link_args
        self.need_xxhash()
        super().build_extensions()

    def need_xxhash(self) -> None:
        # Asked of the compiler, with the flags of the real build, so that CPPFLAGS and CFLAGS count. Its own output is
        # not shown: one sentence is all that is needed. A SetupError leaves setuptools without a traceback.
        probe = "#if !__has_include(<xxhash.h>)\n#error missing\n#endif\n"
        command = [*self.compiler.compiler_so, *(f"-I{path}" for path in self.compiler.include_dirs)]
        found = subprocess.run([*command, "-E", "-x", "c", "-"], input=probe, text=True, capture_output=True)
        if found.returncode and "missing" in found.stderr:
            raise SetupError(
                "xxhash.h is missing: install xxHash's header (Debian package libxxhash-dev), then build again."
            )


class Sdist(sdist):
    """Adds what is no part of a build but of the project: fixtures, test folders, benchmarks."""

    def make_distribution(self) -> None:
        for tree in EXTRA_TREES:
            for folder, folders, files in os.walk(tree):
                folders[:] = sorted(set(folders) - NO_SOURCE)
                self.filelist.extend(os.path.join(folder, name) for name in sorted(files) if not name.endswith(".pyc"))
        self.filelist.sort()
        self.filelist.remove_duplicates()
        super().make_distribution()


setup(
    ext_modules=[
        Extension(
            "mirrorpair._core",
            sources=["mirrorpair/_core.pyx", *sorted(glob("csrc/*.c"))],
            depends=sorted(
                path
                for pattern in ("csrc/*.h", "csrc/*.cdef", "csrc/*.py", "mirrorpair/*.pyx", "mirrorpair/*.pxi")
                for path in glob(pattern)
            ),
            include_dirs=["csrc"],
            define_macros=[STABLE_ABI],
            py_limited_api=True,
        )
    ],
    cffi_modules=["csrc/linux_build.py:ffi"],
    cmdclass={"build_ext": BuildExt, "sdist": Sdist},
    options={
        "build": {"build_base": f"build/{SANITIZERS}" if SANITIZERS else "build"},
        "build_ext": {"cython_c_in_temp": True},
        "bdist_wheel": {"py_limited_api": "cp311"},
    },
)
