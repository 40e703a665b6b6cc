"""Compile every kernel as its op launches it, for an H100, without one: ``python <this file>``.

Ops run on CPU tensors while launches are caught; prints a JSON line per kernel. What the kernels
would write stays uninitialised.
"""

import json
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import hunyuan_kernels as ops
from hunyuan_kernels import dispatch

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
HOPPER = GPUTarget("cuda", 90, 32)


def compile_launch(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    """Compile what would have been launched."""
    given = dict(zip(self.arg_names, args, strict=False))
    given |= {name: options.pop(name) for name in list(options) if name in self.arg_names}
    signature, constants, hints = {}, {}, {}
    for place, parameter in enumerate(self.params):
        value = given[parameter.name]
        fixed = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or fixed:
            signature[parameter.name] = "constexpr"
            constants[(place,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            hints[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                hints[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(self, signature, constants, hints)
    compiled = triton.compile(source, target=HOPPER, options=options)
    shared = compiled.metadata.shared
    print(json.dumps({"kernel": self.__name__, "types": sorted(set(signature.values())),
                      "shared": shared, "cubin": len(compiled.asm["cubin"])}))  # fmt: skip


def launch_all(dtype: torch.dtype) -> None:
    """Call every op, forward and backward, at the widths of the 13B model."""
    batch, tokens, heads, width = 1, 2, 24, 128
    hidden, inner = heads * width, 4 * heads * width

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(dtype).requires_grad_()

    x, row = noise(batch, tokens, hidden), noise(batch, hidden)
    ops.norm_modulate(x, row, row).sum().backward()
    ops.gated_residual(x, row, x).sum().backward()
    q, k, _ = noise(batch, tokens, 3 * hidden).unflatten(-1, (3, heads, width)).unbind(2)
    table = torch.randn(tokens, width // 2)
    q, k = ops.qk_norm_rope(q, k, noise(width), noise(width), table, table)
    (q.sum() + k.sum()).backward()
    ops.gelu_linear2(
        x, noise(batch, tokens, inner), noise(8, hidden + inner), noise(8)
    ).sum().backward()
    out, lse = torch.randn(batch, tokens, heads, width), torch.randn(batch, heads, tokens)
    ops.lse_merge(out, lse, noise(batch, tokens, heads, width).detach(), lse)
    lists = [[torch.randn(99)] for _ in range(4)]
    lists[1] = [lists[1][0].to(dtype)]
    scalar = torch.zeros(())
    for more in (([], []), ([torch.randn(99)], [torch.randn(99).to(dtype)])):
        ops.adamw_ema(
            *lists, [torch.ones(())], *more, skip=scalar if more[0] else None,
            grad_factor=scalar if more[0] else None, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8,
            weight_decay=0.1,
        )  # fmt: skip


if __name__ == "__main__":
    with mock.patch.object(JITFunction, "run", compile_launch), dispatch.also_on("cpu"):
        launch_all(torch.bfloat16)
