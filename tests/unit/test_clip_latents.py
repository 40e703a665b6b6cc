"""A video file to a latent file and back, piece by piece, and the verbs for it."""

import json
import struct
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hunyuan_train.cli.main import main
from hunyuan_train.data.buckets import Bucket, cover_crop
from hunyuan_train.data.decode import VideoReader, frame_pixels
from hunyuan_train.data.latent_file import LatentReader, LatentWriter
from hunyuan_train.engine.clip_latents import encode_clip
from hunyuan_train.evaluation.video import read_video
from hunyuan_train.models.vae.base import Vae
from hunyuan_train.models.vae.build import build_vae
from hunyuan_train.models.vae.config import VaeConfig
from hunyuan_train.models.vae.state_dict import load_vae, save_vae

FRAMES, HEIGHT, WIDTH = 39, 50, 72


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    noise = np.random.default_rng(0).integers(0, 255, (6, 9, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(FRAMES):
            picture = np.roll(noise, number, axis=1).repeat(9, 0).repeat(8, 1)[:HEIGHT]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vae")
    sizes = {"latent_channels": 4, "block_channels": [4, 4, 8, 8], "norm_groups": 2}
    tiles = {"tile_size_px": 32, "tile_frames": 16, "layers_per_block": 1}
    save_vae(noisy(VaeConfig(**sizes, **tiles)), path)
    return path


def noisy(cfg: VaeConfig) -> Vae:
    torch.manual_seed(0)
    vae = build_vae(cfg)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return vae


def pixels_of(path: Path, frames: int, height: int, width: int) -> torch.Tensor:
    """Decode the first frames of a file all at once, [1, 3, F, H, W] in [-1, 1]."""
    with VideoReader(path) as reader:
        bucket = Bucket(frames, height, width)
        cover = cover_crop(reader.info.height, reader.info.width, bucket)
        read = reader.read(range(frames), check_rest=False)
        found = [frame_pixels(f, reader.info.rotation, bucket, cover) for _, f in read]
    return torch.from_numpy(np.stack(found)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def test_a_file_is_encoded_like_its_frames(clip, folder, tmp_path):
    vae, out, seen = load_vae(folder), tmp_path / "new" / "latents.safetensors", []
    summary = encode_clip(
        vae, clip, out, dtype=torch.float32, progress=lambda *done: seen.append(done)
    )
    assert (summary.frames, summary.height, summary.width) == (37, 48, 64)
    assert (summary.left_out, summary.fps) == (2, 12.0)
    assert seen == [(13, 37), (25, 37), (37, 37)]
    with torch.no_grad():
        whole = vae.encode(pixels_of(clip, 37, 48, 64))
    stored = load_file(out)
    assert torch.equal(stored["mean"], whole.mean[0])
    assert torch.equal(stored["std"], whole.std[0])
    reader = LatentReader(out)
    assert reader.metadata["scaling_factor"] == str(vae.cfg.scaling_factor)
    assert reader.metadata["fps"] == "12"
    assert torch.equal(torch.cat(list(reader.means(4)), dim=1), stored["mean"])
    assert [path.name for path in out.parent.iterdir()] == ["latents.safetensors"]


def test_verbs_there_and_back(clip, folder, tmp_path, capsys):
    latents, back = tmp_path / "l.safetensors", tmp_path / "back.mp4"
    vae = f"run.vae={folder}"
    made = f"output={latents}"
    more = ["size=32x48", "every=2", "memory_gib=1"]
    assert main(["encode", vae, f"input={clip}", made, *more]) == 0
    assert "17 frames of 32 x 48 at 6 per second, 3 at the end left out, 16 tiles" in (
        capsys.readouterr().out
    )
    assert main(["decode", vae, f"input={latents}", f"output={back}"]) == 0
    assert "17 frames of 32 x 48 at 6 per second" in capsys.readouterr().out
    video = read_video(back)
    assert video.shape == (3, 17, 32, 48)
    with VideoReader(back) as reader:
        assert reader.info.fps == 6
    stored = load_file(latents)["mean"]
    assert stored.dtype == torch.float16
    with torch.no_grad():
        decoded = load_vae(folder).decode(stored[None].float())[0].clamp(-1, 1)
    assert (video - decoded).abs().mean() < 0.1


def test_the_strictly_causal_vae_takes_the_whole_clip(clip, tmp_path):
    cfg = VaeConfig(
        kind="vae_hy15", latent_channels=4, block_channels=[4, 8, 8, 8, 8], layers_per_block=1,
        tile_temporal=False, tile_size_px=64,
    )  # fmt: skip
    save_vae(noisy(cfg), tmp_path / "vae")
    out, back = tmp_path / "l.safetensors", tmp_path / "back.mp4"
    given = [f"run.vae={tmp_path / 'vae'}", "every=4"]
    assert main(["encode", *given, f"input={clip}", f"output={out}"]) == 0
    assert load_file(out)["mean"].shape == (4, 3, 3, 4)
    assert main(["decode", given[0], f"input={out}", f"output={back}"]) == 0
    assert read_video(back).shape == (3, 9, 48, 64)


@pytest.mark.parametrize("fps", ["29.97", "0.5"])
def test_frame_rates_that_are_no_whole_numbers(folder, tmp_path, fps):
    path, back = tmp_path / "l.safetensors", tmp_path / "back.mp4"
    with LatentWriter(path, (4, 3, 2, 4), torch.float32, {"fps": fps}) as writer:
        writer.add(torch.zeros(4, 3, 2, 4), torch.zeros(4, 3, 2, 4))
    assert main(["decode", f"run.vae={folder}", f"input={path}", f"output={back}"]) == 0
    with VideoReader(back) as reader:
        assert reader.info.fps == pytest.approx(float(fps), rel=2e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "50x48"}, "bucket height=50 is not a multiple of 16; use 48 or 64"),
        ({"size": "50"}, "size=50 is not HEIGHTxWIDTH"),
        ({"every": "0"}, "every=0 must be a number of at least 1"),
        ({"dtype": "int8"}, "dtype=int8 cannot be stored; choose from float16 bfloat16 float32"),
        ({"input": "none.mp4"}, "input=none.mp4 does not exist"),
        ({"colour": "red"}, "colour is not an argument of encode; choose from run.vae input"),
        ({"memory_gib": "0.0001"}, r"encoding one tile of 17 frames of 32 x 32 px takes"),
    ],
)
def test_bad_input_of_encode(clip, folder, tmp_path, capsys, changes, message):
    given = {"run.vae": folder, "input": clip, "output": tmp_path / "x"} | changes
    assert main(["encode", *(f"{key}={value}" for key, value in given.items())]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_bad_input_of_decode(folder, tmp_path, capsys):
    path = tmp_path / "l.safetensors"

    def said() -> str:
        assert main(["decode", f"run.vae={folder}", f"input={path}", "output=x.mp4"]) == 2
        return capsys.readouterr().err

    assert "l.safetensors does not exist; make it with `hunyuan-train encode`" in said()
    path.write_bytes(b"hello, this is no such file")
    assert "is not a safetensors file" in said()
    header = json.dumps({"other": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert "holds no latents of a clip" in said()
    with LatentWriter(path, (3, 1, 2, 2), torch.float32, {}) as writer:
        writer.add(torch.zeros(3, 1, 2, 2), torch.zeros(3, 1, 2, 2))
    assert "has 3 channels, but the VAE decodes 4; give the VAE that encoded it" in said()
    path.write_bytes(path.read_bytes()[:-60])
    assert "is cut short" in said()


def test_a_clip_that_breaks_off_leaves_no_file(clip, folder, tmp_path):
    broken = tmp_path / "broken.mp4"
    data = bytearray(clip.read_bytes())
    middle = len(data) // 3
    data[middle : middle + 200] = bytes(200)
    broken.write_bytes(data)
    with pytest.raises(ValueError, match=r"broken.mp4: .*(corrupt|decode)"):
        encode_clip(load_vae(folder), broken, tmp_path / "out" / "l.safetensors")
    assert not list((tmp_path / "out").iterdir())
