"""``hunyuan-train encode``: a video file of any length to a file of its latents."""

import sys
from collections.abc import Sequence
from pathlib import Path

USAGE = """\
usage: hunyuan-train encode run.vae=FOLDER input=CLIP output=FILE.safetensors [option=.]

writes `mean` and `std` of the latents, [C, T, h, w], unscaled; memory does not grow with the clip
options: size=480x848        height and width to resize and crop to; default those of the clip, cut
                             to multiples of 16
         every=1             take every so many-th frame
         dtype=float16       stored number format: float16 bfloat16 float32
         memory_gib=0        memory for the tiles that run together; 0 runs them one by one
         run.device=auto     auto cpu cuda"""
REQUIRED = ("run.vae", "input", "output")
OPTIONAL = {
    "size": "",
    "every": "1",
    "dtype": "float16",
    "memory_gib": "0",
    "run.device": "auto",
}


def main(argv: Sequence[str]) -> int:
    """Encode and print one line.

    Raises:
        ValueError: an argument or a file that does not fit, in one line.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if argv else 2
    given = parse("encode", argv, REQUIRED, OPTIONAL)
    size = size_of(given["size"])
    every = int(number("every", given["every"], least=1))
    memory = memory_of(given)

    from hunyuan_train.engine.clip_latents import encode_clip, latent_dtype
    from hunyuan_train.models.vae.state_dict import load_vae
    from hunyuan_train.runtime.device import resolve_device

    dtype, source = latent_dtype(given["dtype"]), Path(given["input"])
    if not source.is_file():
        raise ValueError(f"input={source} does not exist")
    vae = load_vae(given["run.vae"], resolve_device(given["run.device"]))
    summary = encode_clip(
        vae,
        source,
        Path(given["output"]),
        size=size,
        every=every,
        free_bytes=memory,
        dtype=dtype,
        progress=show_progress,
    )
    print(f"{given['output']}: {summary}")
    return 0


def parse(
    verb: str, argv: Sequence[str], required: Sequence[str], optional: dict[str, str]
) -> dict[str, str]:
    """Return the ``key=value`` arguments of a verb, with defaults.

    Raises:
        ValueError: an argument is unknown, repeated, missing or no ``key=value``.
    """
    given: dict[str, str] = {}
    for argument in argv:
        key, equals, value = argument.partition("=")
        if not equals or not value:
            raise ValueError(f"{argument} is not key=value")
        if key not in (*required, *optional):
            known = " ".join((*required, *optional))
            raise ValueError(f"{key} is not an argument of {verb}; choose from {known}")
        if key in given:
            raise ValueError(f"{key} is given twice")
        given[key] = value
    if missing := [key for key in required if key not in given]:
        raise ValueError(f"{missing[0]}= is missing; see `hunyuan-train {verb} --help`")
    return optional | given


def memory_of(given: dict[str, str]) -> int | None:
    """Return ``memory_gib`` in bytes, None for 0."""
    size = number("memory_gib", given["memory_gib"], least=0)
    return int(size * 2**30) if size else None


def number(key: str, text: str, *, least: float) -> float:
    """Return the number in a text.

    Raises:
        ValueError: it is none, or too small.
    """
    try:
        value = float(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise ValueError(f"{key}={text} must be a number of at least {least:g}")
    return value


def size_of(text: str) -> tuple[int, int] | None:
    """Return the height and width in ``480x848``, None for no text.

    Raises:
        ValueError: it is not of that form.
    """
    if not text:
        return None
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise ValueError(f"size={text} is not HEIGHTxWIDTH; write it like 480x848")
    return int(parts[0]), int(parts[1])


def show_progress(done: int, total: int) -> None:
    """Keep one line of the terminal up to date, or write one now and then."""
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r{done} of {total} frames", end=end, file=sys.stderr, flush=True)
    elif done == total or done * 10 // total != max(0, done - 48) * 10 // total:
        print(f"{done} of {total} frames", file=sys.stderr, flush=True)
