"""Compiles the C files of ``src/batchjac/native`` when batchjac is built or installed.

With any C compiler that knows GCC's vector types, named by ``CC`` or ``cc``; without one batchjac
is installed all the same and uses torch's kernels. No headers of Python or of torch are needed: the
functions take addresses and sizes, and are loaded with ctypes. OpenMP's functions are found in the
library that torch has loaded, so that both share its threads.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("src/batchjac/native")
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-fno-math-errno", "-ffp-contract=fast")
X86 = {
    "base": ("-DLANES=4",),
    "avx2": ("-DLANES=8", "-mavx2", "-mfma"),
    "avx512": ("-DLANES=16", "-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma"),
}


class Compile(BuildHookInterface):  # type: ignore[misc]  # hatchling says nothing of its type
    """What hatchling calls before it packs the files."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        made = [self._compiled(level, flags) for level, flags in self._levels().items()]
        if any(made):
            build_data["artifacts"].append(str(FOLDER / "*.so"))
            build_data["pure_python"] = False
            where = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{where}"

    def _levels(self) -> dict[str, tuple[str, ...]]:
        """The sets of vector instructions that machines like this one may have."""
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        return X86 if x86 else {"base": X86["base"]}

    def _compiled(self, level: str, flags: tuple[str, ...]) -> Path | None:
        """The library for a set of instructions, or None where it cannot be made."""
        folder = Path(self.root) / FOLDER
        made = folder / f"kernels_{level}.so"
        compiler = shlex.split(os.environ.get("CC", "cc"))
        if not compiler or shutil.which(compiler[0]) is None or sys.platform == "win32":
            return None
        parts = {path: folder / f"{path.stem}_{level}.o" for path in sorted(folder.glob("*.c"))}
        try:
            threads = self._threads(compiler)
            for path, part in parts.items():
                self._run(*compiler, "-c", *FLAGS, *threads, *flags, str(path), "-o", str(part))
            # not linked with OpenMP's library: its functions are torch's when this is loaded
            self._run(*compiler, "-shared", *map(str, parts.values()), "-o", f"{made}.part")
            os.replace(f"{made}.part", made)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", "") or error
            self.app.display_warning(f"batchjac goes without kernels for {level}: {said}")
            made.unlink(missing_ok=True)
            return None
        finally:
            for part in (*parts.values(), Path(f"{made}.part")):
                part.unlink(missing_ok=True)
        return made

    def _threads(self, compiler: list[str]) -> tuple[str, ...]:
        """What asks for OpenMP. Clang's needs a library that torch does not load on Linux."""
        clang = "clang" in self._run(*compiler, "--version")
        return ("-fopenmp",) if sys.platform == "linux" and not clang else ()

    def _run(self, *command: str) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
