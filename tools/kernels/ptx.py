#!/usr/bin/env python3
"""Compiles the kernels of crates/fst-gpu to PTX with NVRTC. Called by build.sh in its environment.

    ptx.py OUTPUT_FOLDER
"""

import ctypes
import glob
import os
import pathlib
import re
import sys

KERNELS = pathlib.Path(__file__).resolve().parents[2] / "crates/fst-gpu/kernels"
SOURCES = ["f64", "f32", "f16", "bf16", "f8e4m3", "f8e5m2", "f8e8m0"]
TARGETS = SOURCES[:-1]  # F8_E8M0 is only decoded
OPTIONS = [
    "--gpu-architecture=compute_70",  # oldest that the casts and loads need; drivers compile it on
    "--std=c++17",
    "--fmad=false",  # conversions are exact sequences of additions
]


def nvrtc():
    import nvidia.cuda_nvrtc

    folder = pathlib.Path(list(nvidia.cuda_nvrtc.__path__)[0]) / "lib"
    # It looks for its built-ins by soname.
    for builtins in glob.glob(str(folder / "libnvrtc-builtins.so.*")):
        ctypes.CDLL(builtins, mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(folder / "libnvrtc.so.12"))


def compile_ptx(library, source, defines):
    def check(result, what):
        if result != 0:
            size = ctypes.c_size_t()
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            sys.exit(f"{source}: {what} failed ({result})\n{log.value.decode()}")

    headers = sorted(KERNELS.glob("*.cuh"))
    texts = (ctypes.c_char_p * len(headers))(*[h.read_bytes() for h in headers])
    names = (ctypes.c_char_p * len(headers))(*[h.name.encode() for h in headers])
    program = ctypes.c_void_p()
    text = (KERNELS / source).read_bytes()
    check(
        library.nvrtcCreateProgram(ctypes.byref(program), text, source.encode(), len(headers), texts, names),
        "nvrtcCreateProgram",
    )
    options = [o.encode() for o in OPTIONS + defines]
    check(library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options)), "compilation")
    size = ctypes.c_size_t()
    check(library.nvrtcGetPTXSize(program, ctypes.byref(size)), "nvrtcGetPTXSize")
    ptx = ctypes.create_string_buffer(size.value)
    check(library.nvrtcGetPTX(program, ptx), "nvrtcGetPTX")
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return shorten(ptx.value.decode())


def shorten(ptx):
    """Without comments, blank lines and unused constants, and with short names for internal functions
    and their parameters: the files are in the repository and in every binary."""
    lines = [line.split("//")[0].rstrip() for line in ptx.splitlines()]
    uses = {}
    for name in re.findall(r"\b_Z\w+", "\n".join(lines)):
        uses[name] = uses.get(name, 0) + 1

    def unused(line):
        constant = re.match(r"\.global .*?(_Z\w+)[^;]*;$", line)
        return constant and uses[constant[1]] == 1

    text = "\n".join(line for line in lines if line and not unused(line)) + "\n"
    short = {}
    # Parameters are called after their function, with a suffix.
    for name in re.findall(r"\b_Z\w+", text):
        function, _, parameter = name.partition("_param_")
        stem = short.setdefault(function, f"f{len(short)}")
        short.setdefault(name, f"{stem}_{parameter}" if parameter else stem)
    return re.sub(r"\b_Z\w+", lambda m: short[m[0]], text)


def main():
    output = pathlib.Path(sys.argv[1])
    os.makedirs(output, exist_ok=True)
    library = nvrtc()
    for name in ("gather", "checksum"):
        (output / f"{name}.ptx").write_text(compile_ptx(library, f"{name}.cu", []))
    for source in SOURCES:
        for target in TARGETS:
            if source != target:
                defines = [f"--define-macro=FST_FROM={source}", f"--define-macro=FST_TO={target}"]
                (output / f"cast_{source}_{target}.ptx").write_text(compile_ptx(library, "cast.cu", defines))


if __name__ == "__main__":
    main()
