"""Variant: a kernel's source with its constants; and the structure of its arguments, read from that source.

A kernel is one file NAME.cu with one function NAME and one `struct Arguments`. Sources include only each other; the text
is put together here, since NVRTC's cache would not notice a changed header.
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

SOURCE_DIR = Path(__file__).parent
_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)
_ARGUMENTS = re.compile(r"^struct Arguments \{\n(.*?)^\};", re.MULTILINE | re.DOTALL)
_FIELD = re.compile(r"^  (const )?(\w+)(\*?) (\w+);")
_SCALARS = {"int32_t": np.int32, "int64_t": np.int64, "float": np.float32}


@dataclass(frozen=True, slots=True)
class Field:
    """One argument: a pointer (`dtype` uint64; written to unless it is const) or a number."""

    name: str
    dtype: np.dtype
    is_pointer: bool
    is_const: bool


@dataclass(frozen=True)
class Variant:
    """A kernel compiled with certain constants.

    Attributes:
        kernel: the name of the file and of the function.
        constants: macros, in order; the value None defines a flag.
        num_threads: of a block.
        shared_bytes: of a block.
        blocks_per_sm: how many blocks must fit a multiprocessor; bounds the registers of a thread.
        architecture: 'sm_90a' where it needs more than what the device's name says; None: the device's own.
        directory: where the sources are.
    """

    kernel: str
    constants: tuple[tuple[str, int | None], ...] = ()
    num_threads: int = 128
    shared_bytes: int = 0
    blocks_per_sm: int = 1
    architecture: str | None = None
    directory: Path = SOURCE_DIR

    def __str__(self) -> str:
        return " ".join(
            [self.kernel, *(name if value is None else f"{name}={value}" for name, value in self.constants)]
        )

    @property
    def definitions(self) -> list[str]:
        """All macros, as compilers take them."""
        launch = (
            ("NUM_THREADS", self.num_threads),
            ("SHARED_BYTES", self.shared_bytes),
            ("BLOCKS_PER_SM", self.blocks_per_sm),
        )
        return [f"-D{name}" if value is None else f"-D{name}={value}" for name, value in (*self.constants, *launch)]

    @property
    def text(self) -> str:
        return source_text(self.kernel, self.directory)

    @property
    def fields(self) -> tuple[Field, ...]:
        return argument_fields(self.kernel, self.directory)

    @property
    def argument_dtype(self) -> np.dtype:
        """The structure of the arguments as numpy lays it out, which is as C++ does."""
        return np.dtype([(field.name, field.dtype) for field in self.fields], align=True)


@cache
def source_text(kernel: str, directory: Path) -> str:
    """The kernel's file with the headers it includes in it, each once; #line directives keep places true."""
    included: set[str] = set()

    def expand(name: str) -> str:
        parts, line = [f'#line 1 "{name}"\n'], 1
        for row in (directory / name).read_text(encoding="utf-8").splitlines():
            line += 1
            match = _INCLUDE.match(row)
            if match is None:
                parts.append("" if row == "#pragma once" else row)
                parts.append("\n")
            elif match[1] not in included:
                included.add(match[1])
                parts.append(f'{expand(match[1])}#line {line} "{name}"\n')
            else:
                parts.append("\n")
        return "".join(parts)

    return expand(f"{kernel}.cu")


@cache
def argument_fields(kernel: str, directory: Path) -> tuple[Field, ...]:
    """The fields of the kernel's `struct Arguments`, in order."""
    structure = _ARGUMENTS.search(source_text(kernel, directory))
    assert structure is not None, f"{kernel}.cu has no struct Arguments"
    fields = []
    for row in structure[1].splitlines():
        match = _FIELD.match(row)
        assert match is not None, f"{kernel}.cu: not understood in struct Arguments: {row}"
        const, scalar, pointer, name = match.groups()
        dtype = np.dtype(np.uint64) if pointer else np.dtype(_SCALARS[scalar])
        fields.append(Field(name, dtype, is_pointer=bool(pointer), is_const=bool(const)))
    return tuple(fields)
