"""Build the compiled code for CPUs (`hf_llama_repro/kernel`) where there is a compiler for it.

All else is in pyproject.toml. Each library is the same source, compiled for another kind of processor. It is called
through ctypes and needs nothing of Python's, so that one wheel serves every version. They are libraries of their own
because a linker keeps one copy of what the standard library's templates give: for whichever processor it saw first.
"""

import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

KERNEL = Path("hf_llama_repro/kernel")
# Not -ffast-math: linked into a library it would make denormal numbers zero in all of the process.
FLAGS = [
    *("-std=gnu++17", "-O3", "-g0", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-fno-wrapv", "-w", "-Wno-psabi"),
    *("-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros"),
]
# Library -> what the processor must have: `processor.h` looks for the same, and `cpu_kernel.LIBRARIES` has the names.
# Tuned for no processor in particular, the products of several tokens in bf16 take 10 % longer.
LIBRARIES = {"generic": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    LIBRARIES["avx2"] = ["-mtune=haswell", "-mavx2", "-mfma"]
    LIBRARIES["avx512_bf16"] = [
        *("-mtune=icelake-server", "-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        *("-mavx512vnni", "-mavx512bf16"),
    ]


class BuildLibraries(build_ext):
    """Plain shared libraries. One that cannot be built is left out, with a warning."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or True

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        in_the_tree = KERNEL / library.name
        if self.editable_mode and not newer_group([*ext.sources, *ext.depends, __file__], in_the_tree):
            return
        for stale in (library, *([in_the_tree] if self.editable_mode else [])):
            stale.unlink(missing_ok=True)  # else it would stay, from other sources, where this build fails
        aside = os.path.join(self.build_temp, ext.name)
        objects = self.compiler.compile(ext.sources, output_dir=aside, extra_postargs=ext.extra_compile_args)
        # Not -fopenmp: the library is to use the OpenMP that PyTorch has loaded, as `cpu_kernel` sees to.
        self.compiler.link_shared_object(objects, str(library), extra_postargs=["-lm"], target_lang="c++")


class PlatformWheel(bdist_wheel):
    """For one platform, and any Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            f"hf_llama_repro.kernel.{name}",
            [str(KERNEL / "kernel.cpp")],
            depends=[str(header) for header in sorted(KERNEL.glob("*.h"))],
            extra_compile_args=[*FLAGS, *flags],
            language="c++",
            optional=True,
        )
        for name, flags in LIBRARIES.items()
    ],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel},
)
