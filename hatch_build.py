"""Compiles ``src/batchjac/native/kernels.c`` when batchjac is built or installed.

With any C compiler that knows GCC's vector types, named by ``CC`` or ``cc``; without one batchjac
is installed all the same and uses torch's kernels. No headers of Python or of torch are needed: the
functions take addresses and sizes, and are loaded with ctypes. OpenMP's functions are found in the
library that torch has loaded, so that both share its threads.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("src/batchjac/native")
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-fno-math-errno", "-ffp-contract=fast", "-shared")
X86 = {
    "base": ("-DLANES=4",),
    "avx2": ("-DLANES=8", "-mavx2", "-mfma"),
    "avx512": ("-DLANES=16", "-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma"),
}


class Compile(BuildHookInterface):  # type: ignore[misc]  # hatchling says nothing of its type
    """What hatchling calls before it packs the files."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        made = [self._compiled(level, flags) for level, flags in self._levels().items()]
        if all(made):
            build_data["artifacts"] += [str(path) for path in made]
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
        compiler = shutil.which(os.environ.get("CC", "cc"))
        if compiler is None or sys.platform == "win32":
            return None
        # not linked with OpenMP's library: its functions are torch's when this is loaded
        threads = ("-fopenmp", "-c") if sys.platform == "linux" else ("-c",)
        single = [f for f in FLAGS if f != "-shared"]
        part = made.with_suffix(".o")
        commands = (
            [compiler, *single, *threads, *flags, str(folder / "kernels.c"), "-o", str(part)],
            [compiler, "-shared", str(part), "-o", f"{made}.part"],
        )
        try:
            for command in commands:
                subprocess.run(command, check=True, capture_output=True, text=True)
            os.replace(f"{made}.part", made)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", "") or error
            self.app.display_warning(f"batchjac goes without kernels for {level}: {said}")
            made.unlink(missing_ok=True)
            return None
        finally:
            part.unlink(missing_ok=True)
            Path(f"{made}.part").unlink(missing_ok=True)
        return made
