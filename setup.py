# SPDX-License-Identifier: Apache-2.0
"""Builds csgd_cuda._C. Metadata is in pyproject.toml.

CSGD_CUDA_BUILD   auto (default): with CUDA when torch is a CUDA build and a toolkit is there, else CPU only
                  cuda: with CUDA or fail; cpu: without CUDA; none: no extension, the reference does the work
TORCH_CUDA_ARCH_LIST   the GPU architectures, as for any torch extension, e.g. "8.0;9.0+PTX"
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
CXX_FLAGS = ["-O3", "-ffp-contract=off", "-fvisibility=hidden", "-fopenmp"]
NVCC_FLAGS = ["-O3", "-fmad=false", "-Xcompiler=-ffp-contract=off"]
DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"


def fail(sentence):
    sys.exit(f"csgd_cuda: {sentence}")


def build_mode():
    mode = os.environ.get("CSGD_CUDA_BUILD", "auto")
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
    """The major version of a CUDA toolkit, as text."""
    nvcc = os.path.join(toolkit, "bin", "nvcc")
    release = re.search(r"release (\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    return release.group(1) if release else "unknown"


def want_cuda(mode, torch, toolkit):
    """Whether to build the CUDA kernels, with a word about why not."""
    if mode == "cpu":
        return False
    missing = None
    if torch.version.cuda is None:
        missing = f"torch {torch.__version__} is not a CUDA build"
    elif toolkit is None:
        missing = "no CUDA toolkit (bin/nvcc with include/cuda_runtime.h) was found; set CUDA_HOME"
    elif (version := toolkit_version(toolkit)) != torch.version.cuda.split(".")[0]:
        missing = (
            f"torch is built with CUDA {torch.version.cuda} and the toolkit in {toolkit} is {version}; set CUDA_HOME"
        )
    if missing and mode == "cuda":
        fail(f"CSGD_CUDA_BUILD=cuda, but {missing}.")
    if missing:
        print(f"csgd_cuda: building for the CPU only: {missing}.")
    return not missing


def extension(mode):
    torch = import_torch()
    toolkit = find_toolkit() if mode != "cpu" and torch.version.cuda else None
    if toolkit:
        os.environ["CUDA_HOME"] = toolkit  # read by torch.utils.cpp_extension when it is imported
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    cuda = want_cuda(mode, torch, toolkit)
    if cuda and not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
    sources = [*glob.glob("csrc/ops/*.cpp"), *glob.glob("csrc/cpu/*.cpp")]
    if cuda:
        sources += glob.glob("csrc/cuda/*.cu")
    module = (CUDAExtension if cuda else CppExtension)(
        "csgd_cuda._C",
        sorted(sources),
        define_macros=[("CSGD_WITH_CUDA", "1" if cuda else "0")],
        depends=sorted([*glob.glob("csrc/**/*.h", recursive=True), *glob.glob("csrc/**/*.cuh", recursive=True)]),
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS} if cuda else {"cxx": CXX_FLAGS},
        extra_link_args=["-fopenmp"],
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


# Tools and tests take the flags and functions from here with runpy.run_path, under another name.
if __name__ == "__main__":
    mode = build_mode()
    setup(**({} if mode == "none" else extension(mode)))
