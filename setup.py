"""Builds the package and, where a compiler and torch are at hand, the C++ library in `csrc`.

FASTVLM_LOSS_CPP=auto (default) builds it if possible and warns if not; 1 insists; 0 leaves it out.
FASTVLM_LOSS_SANITIZE=1 builds it with the address and undefined-behaviour sanitizers.
"""

import os
import sys
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

WANTED = os.environ.get("FASTVLM_LOSS_CPP", "auto")
if WANTED not in ("auto", "0", "1"):
    sys.exit(f"FASTVLM_LOSS_CPP: got {WANTED!r}, wanted auto, 0 or 1")
STABLE_SINCE = "0x020b000000000000"  # torch 2.11


def extension() -> tuple[list[Extension], type[build_ext]]:
    """The C++ extension and the command that builds it."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Optional(BuildExtension):  # type: ignore[misc]
        """A failed build leaves a working package unless FASTVLM_LOSS_CPP=1."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                if WANTED == "1":
                    raise
                warnings.warn(f"fastvlm_loss: built without its C++ library: {error}", stacklevel=1)

    sanitize = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g", "-DFASTVLM_POISON"]
    sanitize = sanitize if os.environ.get("FASTVLM_LOSS_SANITIZE") == "1" else []
    flags = [
        "-O3",
        "-std=c++17",
        "-ffp-contract=fast",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fno-strict-aliasing",
        "-fvisibility=hidden",
    ]
    library = CppExtension(
        "fastvlm_loss._C",
        sorted(str(p) for p in Path("csrc").glob("*.cpp")),
        depends=sorted(str(p) for p in Path("csrc").iterdir()),
        extra_compile_args={"cxx": [*flags, "-Wno-psabi", f"-DTORCH_TARGET_VERSION={STABLE_SINCE}", *sanitize]},
        extra_link_args=sanitize,
        py_limited_api=True,
    )
    return [library], Optional


modules, command = [], build_ext
if WANTED != "0":
    try:
        modules, command = extension()
    except ImportError as error:
        if WANTED == "1":
            sys.exit(f"FASTVLM_LOSS_CPP=1 needs torch in the build environment (pip --no-build-isolation): {error}")
        warnings.warn(
            "fastvlm_loss: built without its C++ library: no torch in the build environment; "
            "install torch first and use pip install --no-build-isolation",
            stacklevel=1,
        )

setup(
    ext_modules=modules,
    cmdclass={"build_ext": command},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if modules else {},
)
