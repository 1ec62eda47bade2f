"""Triton's interpreter: which tests need it, and made faster for them."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy
import pytest

interpreting = os.environ.get("TRITON_INTERPRET") == "1"
needs_interpreter = pytest.mark.skipif(
    not interpreting, reason="launches Triton kernels on the CPU; run with TRITON_INTERPRET=1"
)
"""Of tests on a machine with a GPU, where kernels are compiled unless one asks for the other."""


def compiling_environment() -> dict[str, str]:
    """Of a process in which kernels are compiled, whatever they are in this one."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def make_faster() -> None:
    """For all tests of this process."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    # On a GPU only launches in debug mode check each sum of integers for an overflow.
    builder.options = replace(builder.options, sanitize_overflow=False)
    numpy_type = cache(interpreter._get_np_dtype)  # which makes a table at each call
    pointer = numpy.dtype(numpy.uint64)
    interpreter._get_np_dtype = lambda type_: (
        pointer if type_.scalar.is_ptr() else numpy_type(type_.scalar)
    )
    _patch_language_once()


def _patch_language_once() -> None:
    """A kernel's start patches triton.language; each call of a function inside the kernel does it
    again, which takes four tenths of the time and has an effect only in the first call from each
    file (of Triton's own, which know the language by another name). The others are left out."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def once(kernel: Callable[..., Any]) -> Any:
        scope = patch(kernel)
        restore, files = scope.restore, {id(kernel.__globals__)}

        def of_call(function: Callable[..., Any]) -> None:
            if id(function.__globals__) not in files:
                files.add(id(function.__globals__))
                patch(function)

        def restored() -> None:
            interpreter._patch_lang = once
            restore()

        scope.restore = restored
        interpreter._patch_lang = of_call
        return scope

    interpreter._patch_lang = once
