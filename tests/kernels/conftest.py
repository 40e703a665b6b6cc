"""Kernels run in Triton's interpreter where there is no GPU, compiled where there is one.

Triton reads TRITON_INTERPRET where a kernel is decorated and while it runs, so it is set for the
import of the kernels and for the tests of this folder alone.
"""

import importlib
import os
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from hunyuan_kernels import dispatch

INTERPRET = not torch.cuda.is_available()
_VARIABLE = {"TRITON_INTERPRET": "1"} if INTERPRET else {}

with mock.patch.dict(os.environ, _VARIABLE):
    for op in dispatch.OPS:
        importlib.import_module(f"hunyuan_kernels.ops.{op}.kernel")


@pytest.fixture(autouse=True)
def _kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    on_gpu = request.node.get_closest_marker("gpu") is not None
    if on_gpu and INTERPRET:
        pytest.skip("no NVIDIA GPU here")
    if not INTERPRET:
        if not on_gpu and request.node.get_closest_marker("kernel") is not None:
            pytest.skip("kernels are compiled in this process")
        yield
        return
    from hunyuan_kernels.testing import interpreted

    with mock.patch.dict(os.environ, _VARIABLE), interpreted():
        yield
