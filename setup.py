# SPDX-License-Identifier: Apache-2.0
"""Builds csgd_cuda._C. Metadata is in pyproject.toml.

CSGD_CUDA_BUILD   auto (default): with CUDA when torch is a CUDA build and a toolkit is there, else CPU only
                  cuda: with CUDA or fail; cpu: without CUDA; none: no extension, the reference does the work
TORCH_CUDA_ARCH_LIST   the GPU architectures, as for any torch extension, e.g. "8.0;9.0+PTX"; 7.0 is the oldest
CUDA_HOME              the CUDA toolkit, where it is not found by itself
"""

import glob
import os
import re
import shutil
import subprocess
import sys

from setuptools import setup

# The update rule rounds each operation on its own (csrc/core/update_rule.h): FMA contraction would change bits.
# at::parallel_for is a template over OpenMP: without -fopenmp it runs on one thread, without a word. The runtime is
# torch's own libgomp, which is loaded under the same name.
# All these come after the flags of CFLAGS and CXXFLAGS, and so undo -Ofast and -ffast-math there. EXACT is for the
# linker as well, which would otherwise add code that makes subnormal numbers zero in the whole process. What NVCC_FLAGS
# says of nvcc's arithmetic is its default, which --use_fast_math would change.
EXACT = ["-O3", "-fno-fast-math", "-fno-unsafe-math-optimizations"]
CXX_FLAGS = [*EXACT, "-ffp-contract=off", "-fvisibility=hidden", "-fopenmp"]
NVCC_FLAGS = ["-O3", "-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true"]
NVCC_FLAGS += [f"-Xcompiler={flag}" for flag in (*EXACT[1:], "-ffp-contract=off")]
LEAST_TOOLKIT = (12, 1)  # with which a kernel can have more than 4 KB of arguments
LEAST_ARCHITECTURE = (7, 0)  # likewise
# Where no GPU is visible. torch 2.11, the oldest that is supported, accepts all of them.
DEFAULT_ARCHITECTURES = ["8.0", "9.0", "10.0", "12.0"]
OLD_NAMES = {"Kepler": (3, 5), "Maxwell": (5, 0), "Pascal": (6, 0)}  # in TORCH_CUDA_ARCH_LIST, besides numbers


def fail(sentence):
    sys.exit(f"csgd_cuda: {sentence}")


def build_mode():
    mode = os.environ.get("CSGD_CUDA_BUILD") or "auto"
    if mode not in ("auto", "cuda", "cpu", "none"):
        fail(f"CSGD_CUDA_BUILD must be auto, cuda, cpu or none, got {mode!r}.")
    return mode


def holds_toolkit(folder):
    return bool(folder) and all(
        os.path.isfile(os.path.join(folder, *part)) for part in (("include", "cuda_runtime.h"), ("bin", "nvcc"))
    )


def toolkit_of_nvcc(nvcc):
    """The folder above the real nvcc. A wrapper script may stand in another place, so nvcc reports it."""
    try:
        dry_run = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", os.devnull, "-c", "-o", os.devnull],
            capture_output=True,
            text=True,
            timeout=60,
        )
        here = re.search(r"_HERE_=(.+)", dry_run.stderr + dry_run.stdout)
    except (OSError, subprocess.SubprocessError):
        here = None
    binary = here.group(1).strip() if here else os.path.dirname(os.path.realpath(nvcc))
    return os.path.dirname(binary)


def find_toolkit():
    """The CUDA toolkit that really holds cuda_runtime.h and nvcc, or None."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named and not holds_toolkit(named):
        fail(f"CUDA_HOME is {named}, which holds no include/cuda_runtime.h and bin/nvcc; correct or unset it.")
    nvcc = shutil.which("nvcc")
    candidates = [named, toolkit_of_nvcc(nvcc) if nvcc else None]
    candidates += [os.path.dirname(os.path.dirname(nvcc)) if nvcc else None, "/usr/local/cuda"]
    candidates += sorted(glob.glob("/usr/local/cuda-*"), reverse=True)
    return next((folder for folder in candidates if holds_toolkit(folder)), None)


def import_torch():
    try:
        import torch
    except ImportError as error:
        fail(
            f"cannot import torch ({error}); install torch first, then run `pip install --no-build-isolation .`, "
            "or set CSGD_CUDA_BUILD=none for the pure-PyTorch package."
        )
    return torch


def toolkit_version(toolkit):
    """(major, minor) of a CUDA toolkit."""
    nvcc = os.path.join(toolkit, "bin", "nvcc")
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", text)
    return tuple(map(int, release.groups())) if release else (0, 0)


def dotted(version):
    return ".".join(map(str, version))


def why_no_cuda(torch, toolkit):
    """Why the CUDA kernels cannot be built and what to do, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    if toolkit is None:
        return "no CUDA toolkit (bin/nvcc with include/cuda_runtime.h) was found; set CUDA_HOME"
    version = toolkit_version(toolkit)
    if dotted(version[:1]) != torch.version.cuda.split(".")[0]:
        return (
            f"torch is built with CUDA {torch.version.cuda} and the toolkit in {toolkit} is {dotted(version)}; "
            "set CUDA_HOME"
        )
    if version < LEAST_TOOLKIT:
        return (
            f"the toolkit in {toolkit} is CUDA {dotted(version)} and the kernels need {dotted(LEAST_TOOLKIT)} or "
            "later; install a newer toolkit, or set CUDA_HOME to one"
        )
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):  # then torch takes the architectures of the visible GPUs
        for number in range(torch.cuda.device_count()):
            capability = torch.cuda.get_device_capability(number)
            if capability < LEAST_ARCHITECTURE:
                return (
                    f"GPU {number} has compute capability {dotted(capability)} and the kernels need "
                    f"{dotted(LEAST_ARCHITECTURE)} or later; hide it with CUDA_VISIBLE_DEVICES"
                )
    return None


def want_cuda(mode, torch, toolkit):
    """Whether to build the CUDA kernels, with a word about why not."""
    if mode == "cpu":
        return False
    missing = why_no_cuda(torch, toolkit)
    if missing and mode == "cuda":
        fail(f"CSGD_CUDA_BUILD=cuda, but {missing}.")
    if missing:
        print(f"csgd_cuda: building for the CPU only: {missing}.")
    return not missing


def check_architectures(listed):
    """Refuses a TORCH_CUDA_ARCH_LIST with an architecture for which the kernels cannot be compiled."""
    versions = {text: tuple(map(int, text.split("."))) for text in re.findall(r"\d+\.\d+", listed)}
    versions |= {name: version for name, version in OLD_NAMES.items() if name in listed}
    for text, version in versions.items():
        if version < LEAST_ARCHITECTURE:
            fail(
                f"TORCH_CUDA_ARCH_LIST is {listed!r} and the kernels need {dotted(LEAST_ARCHITECTURE)} or later; "
                f"leave out {text}."
            )


def default_architectures(toolkit):
    """Those that this toolkit knows, and PTX of the newest for the GPUs to come, as torch writes such a list."""
    nvcc = os.path.join(toolkit, "bin", "nvcc")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    chosen = [name for name in DEFAULT_ARCHITECTURES if f"compute_{name.replace('.', '')}" in known]
    return ";".join(chosen or DEFAULT_ARCHITECTURES[:1]) + "+PTX"


def check_nvcc_flags():
    """Refuses what nvcc itself adds to every command and what would change the bits of a step."""
    for variable in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"):
        wrong = r"-+(?:use_fast_math|(?:fmad|ftz)[= ]true|prec-(?:div|sqrt)[= ]false)"
        if found := re.search(wrong, os.environ.get(variable, "")):
            fail(f"{variable} has {found.group()}, which changes the bits of a step; leave it out.")


def cxx_flags():
    """CXX_FLAGS, without debug information unless CFLAGS or CXXFLAGS asks for it. Python's own flags often do; it
    takes a third of the compiler's time and nine tenths of the file."""
    given = " ".join(os.environ.get(name, "") for name in ("CFLAGS", "CXXFLAGS")).split()
    return [*CXX_FLAGS, *([] if any(flag.startswith("-g") for flag in given) else ["-g0"])]


def missing_sources(sources, cuda):
    """Files that the sources include, or that implement what they include, and that are not there.

    The loops and kernels that NAME_cpu.h or NAME_cuda.h declares are in a source file of that name. Without it the
    extension would be built, and would not load.
    """
    waiting, seen, missing = list(sources), set(), []
    while waiting:
        path = waiting.pop()
        if path in seen or (path.startswith(os.path.join("csrc", "cuda")) and not cuda):
            continue
        seen.add(path)
        if not os.path.isfile(path):
            missing.append(path)
            continue
        with open(path, encoding="utf-8") as file:
            included = re.findall(r'^\s*#\s*include\s*"(.+)"', file.read(), re.MULTILINE)
        waiting += [os.path.normpath(os.path.join(os.path.dirname(path), name)) for name in included]
        for declares, implements in (("_cpu.h", "_cpu.cpp"), ("_cuda.h", "_cuda.cu")):
            if path.endswith(declares):
                waiting.append(path[: -len(declares)] + implements)
    return sorted(missing)


def check_sources(sources, cuda):
    missing = missing_sources(sources, cuda) if sources else [os.path.join("csrc", "ops")]
    if missing:
        fail(
            f"{', '.join(missing)}: not there, so that this folder or archive is not whole; take a clone of the "
            "repository, or an archive that `python -m build --sdist` makes of one, or set CSGD_CUDA_BUILD="
            f"{'cpu or ' if cuda else ''}none to build without."
        )


def only_packs(arguments):
    """Whether setup.py makes an archive of the sources and compiles nothing, for which it needs no torch.

    What goes into the archive is in MANIFEST.in. If it came from the extension, it would depend on the machine.
    """
    builds = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}
    return not {"sdist", "egg_info"}.isdisjoint(arguments) and builds.isdisjoint(arguments)


def extension(mode):
    torch = import_torch()
    toolkit = find_toolkit() if mode != "cpu" and torch.version.cuda else None
    if toolkit:
        os.environ["CUDA_HOME"] = toolkit  # read by torch.utils.cpp_extension when it is imported
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    cuda = want_cuda(mode, torch, toolkit)
    if cuda:
        check_nvcc_flags()
        check_architectures(os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
        if not torch.cuda.is_available() and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
            os.environ["TORCH_CUDA_ARCH_LIST"] = default_architectures(toolkit)
    sources = [*glob.glob("csrc/ops/*.cpp"), *glob.glob("csrc/cpu/*.cpp")]
    if cuda:
        sources += glob.glob("csrc/cuda/*.cu")
    check_sources(sources, cuda)
    module = (CUDAExtension if cuda else CppExtension)(
        "csgd_cuda._C",
        sorted(sources),
        define_macros=[("CSGD_WITH_CUDA", "1" if cuda else "0")],
        depends=sorted([*glob.glob("csrc/**/*.h", recursive=True), *glob.glob("csrc/**/*.cuh", recursive=True)]),
        extra_compile_args={"cxx": cxx_flags(), **({"nvcc": NVCC_FLAGS} if cuda else {})},
        extra_link_args=["-fopenmp", *EXACT],
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


# Tools and tests take the flags and functions from here with runpy.run_path, under another name.
if __name__ == "__main__":
    mode = build_mode()
    setup(**({} if mode == "none" or only_packs(sys.argv[1:]) else extension(mode)))
