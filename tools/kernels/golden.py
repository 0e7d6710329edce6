#!/usr/bin/env python3
"""Writes crates/fst-gpu/golden/: what PyTorch's `tensor.to(dtype)` makes of chosen inputs on the CPU.

    python tools/kernels/golden.py [--check]

Needs torch 2.11 and numpy. Tests of fst-gpu rebuild the inputs described here (tests/golden/mod.rs
has the same rules in Rust), cast them and compare.

    hashes.txt  one line a pair: from to count sha256 nan_bits
                sha256 is over all outputs, little-endian, every NaN replaced by one pattern;
                nan_bits is the sha256 over the raw outputs where PyTorch's vectorised and scalar
                loops agree about the bits of NaN, else `-`
    tables.txt  one line a (pair, input): from to input output, in hex, outputs with that one NaN;
                all inputs of the 8-bit types, edge values of the others: to see what went wrong
"""

import argparse
import hashlib
import pathlib
import sys

import numpy as np
import torch

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "crates/fst-gpu/golden"

TYPES = {  # name: (torch dtype, unsigned numpy type of its size, canonical NaN)
    "f64": (torch.float64, np.uint64, 0x7FF8000000000000),
    "f32": (torch.float32, np.uint32, 0x7FC00000),
    "f16": (torch.float16, np.uint16, 0x7E00),
    "bf16": (torch.bfloat16, np.uint16, 0x7FC0),
    "f8e4m3": (torch.float8_e4m3fn, np.uint8, 0x7F),
    "f8e5m2": (torch.float8_e5m2, np.uint8, 0x7F),
    "f8e8m0": (torch.float8_e8m0fnu, np.uint8, 0xFF),
}
SIGNED = {np.uint64: torch.int64, np.uint32: torch.int32, np.uint16: torch.int16, np.uint8: torch.uint8}

# Low halves that sit on, just below and just above the midpoints of F16 and BF16; the 8-bit types'
# midpoints lie in the high half.
F32_LOW = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
# The 29 bits that F32 has not: on, below and above its midpoint.
F64_LOW = [0, 1, 0x0FFFFFFF, 0x10000000, 0x10000001, 0x1FFFFFFF]
RANDOM = 1 << 16


def splitmix(seed, count):
    """splitmix64: the same numbers in any language."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.uint64(0x9E3779B97F4A7C15) * np.arange(1, count + 1, dtype=np.uint64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def inputs(name):
    """Every input of a type, as unsigned integers, in the order that is hashed."""
    uint = TYPES[name][1]
    if uint in (np.uint8, np.uint16):
        return np.arange(1 << (8 * uint().itemsize), dtype=uint)
    if name == "f32":
        high = np.arange(1 << 16, dtype=np.uint32) << 16
        grid = (high[:, None] | np.array(F32_LOW, np.uint32)).reshape(-1)
        return np.concatenate([grid, splitmix(32, RANDOM).astype(np.uint32)])
    # Finite F32 values (high halves, with and without their lowest bit), as F64, and their
    # neighbours around the midpoints between F32 values: here a cast by way of F32 rounds twice.
    narrow = np.arange(1 << 16, dtype=np.uint32) << 16
    narrow = narrow[(narrow & 0x7F800000) != 0x7F800000]
    narrow = np.stack([narrow, narrow | 1], axis=1).reshape(-1)
    wide = narrow.view(np.float32).astype(np.float64).view(np.uint64)
    near = (wide[:, None] | np.array(F64_LOW, np.uint64)).reshape(-1)
    high = np.arange(1 << 16, dtype=np.uint64) << np.uint64(48)
    far = (high[:, None] | np.array([0, 1, (1 << 48) - 1], np.uint64)).reshape(-1)
    return np.concatenate([near, far, splitmix(64, RANDOM)])


def edges(name):
    """The inputs listed one by one in tables.txt."""
    uint = TYPES[name][1]
    if uint == np.uint8:
        return np.arange(256, dtype=np.uint8)
    values = [0.0, 1.0, 1.5, 1 / 3, 65504, 65519, 65520, 65536, 448, 463.9, 464, 464.1, 480, 57344, 61439, 61440]
    values += [2.0**e * m for e in (-6, -7, -9, -10, -14, -16, -17, -24, -25, -126, -127, -133, -134, -149)
               for m in (0.75, 1, 1.001, 1.25, 1.5)]
    values += [3.3895e38, 3.4028235e38, 3.4028236e38, 1e39, float("inf"), float("nan")]
    values = np.array(values, np.float64)
    with np.errstate(over="ignore"):
        bits = torch.from_numpy(np.concatenate([values, -values])).to(TYPES[name][0])
    return np.unique(bits.view(SIGNED[uint]).numpy().view(uint))


def cast(bits, name, to):
    source, uint, _ = TYPES[name]
    signed = torch.from_numpy(bits.copy().view(np.dtype(uint).str.replace("u", "i") if uint != np.uint8 else uint))
    dense = signed.view(source).to(TYPES[to][0])
    # A strided tensor takes PyTorch's scalar loop.
    strided = torch.zeros(2 * len(bits), dtype=signed.dtype)
    strided[::2] = signed
    scalar = strided.view(source)[::2].to(TYPES[to][0])
    back = TYPES[to][1]
    raw = [t.contiguous().view(SIGNED[back]).numpy().view(back) for t in (dense, scalar)]
    nan = torch.isnan(dense.to(torch.float64)).numpy()
    nan_scalar = torch.isnan(scalar.to(torch.float64)).numpy()
    canonical = np.where(nan, back(TYPES[to][2]), raw[0])
    if not np.array_equal(canonical, np.where(nan_scalar, back(TYPES[to][2]), raw[1])):
        sys.exit(f"{name} to {to}: PyTorch's own two loops disagree")
    return canonical, raw[0] if np.array_equal(*raw) else None


def digest(array):
    return hashlib.sha256(array.astype(array.dtype.newbyteorder("<")).tobytes()).hexdigest()


def build():
    torch.set_num_threads(1)
    head = f"# written by tools/kernels/golden.py, torch {torch.__version__.split('+')[0]}\n"
    hashes, tables = [head], [head]
    for name in TYPES:
        for to in TYPES:
            if name == to or to == "f8e8m0":
                continue
            all_inputs = inputs(name)
            outputs, raw = cast(all_inputs, name, to)
            exact = digest(raw) if raw is not None else "-"
            hashes.append(f"{name} {to} {len(all_inputs)} {digest(outputs)} {exact}\n")
            chosen = edges(name)
            for i, o in zip(chosen, cast(chosen, name, to)[0]):
                tables.append(f"{name} {to} {int(i):x} {int(o):x}\n")
    return {"hashes.txt": "".join(hashes), "tables.txt": "".join(tables)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the files instead of writing them")
    arguments = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in build().items():
        if not arguments.check:
            (FOLDER / name).write_text(text)
        elif (FOLDER / name).read_text() != text:
            sys.exit(f"{FOLDER / name} differs from what PyTorch gives")


if __name__ == "__main__":
    main()
