"""``hunyuan-train decode``: a file of latents back to a video."""

from collections.abc import Sequence
from pathlib import Path

from hunyuan_train.cli.encode import memory_of, parse, show_progress

USAGE = """\
usage: hunyuan-train decode run.vae=FOLDER input=FILE.safetensors output=CLIP.mp4 [option=.]

input is a file of `hunyuan-train encode`; memory does not grow with the clip
options: memory_gib=0        memory for the tiles that run together; 0 runs them one by one
         run.device=auto     auto cpu cuda"""
REQUIRED = ("run.vae", "input", "output")
OPTIONAL = {"memory_gib": "0", "run.device": "auto"}


def main(argv: Sequence[str]) -> int:
    """Decode and print one line.

    Raises:
        ValueError: an argument or a file that does not fit, in one line.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if argv else 2
    given = parse("decode", argv, REQUIRED, OPTIONAL)
    memory = memory_of(given)

    from hunyuan_train.engine.clip_latents import decode_clip
    from hunyuan_train.models.vae.state_dict import load_vae
    from hunyuan_train.runtime.device import resolve_device

    vae = load_vae(given["run.vae"], resolve_device(given["run.device"]))
    output = Path(given["output"])
    summary = decode_clip(
        vae, Path(given["input"]), output, free_bytes=memory, progress=show_progress
    )
    print(f"{output}: {summary}")
    return 0
