"""Text features that see the first frame, against the image-to-video pipeline of diffusers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoImageToVideoPipeline
from test_text_features import (
    MAX_LENGTH,
    TEXT_DIM,
    clip_folder,
    config,
    llama_config,
    llama_tokenizer,
    randomise,
)
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from hunyuan_train.encoders.config import EncoderDtype, TextEncoderKind
from hunyuan_train.encoders.templates import PICTURE_TEMPLATE
from hunyuan_train.encoders.text import TextEncoder, build_text_encoder

__all__ = ["clip_folder"]

CAPTIONS = [
    "a red circle moving left",
    "",
    "camera movements\n\nof objects\n\n",
    " ".join(["size"] * 40),  # longer than MAX_LENGTH
    " ".join(["size"] * 21),  # only a part of the closing header is left
]
TOKENS = 16
SIZE = 28


@pytest.fixture
def llava_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "llava"
    tokenizer = llama_tokenizer(pictures=True)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=7,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=llama_config(),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            pad_token_id=tokenizer.pad_token_id,
            image_seq_length=TOKENS,
        )
    )
    randomise(model, 3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sizes = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    CLIPImageProcessor(**sizes).save_pretrained(folder)
    return folder


def build(llava_folder: Path, clip_folder: Path, stride: int = 2, **changes) -> TextEncoder:
    sizes = {"kind": TextEncoderKind.llava, "image_tokens": TOKENS, "image_stride": stride}
    return build_text_encoder(config(llava_folder, clip_folder, **(sizes | changes)))


def pictures(count: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (40, 52, 3), np.uint8) for _ in range(count)]


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_features_equal_the_ones_of_the_diffusers_pipeline(
    llava_folder: Path, clip_folder: Path, stride: int
) -> None:
    pipeline = HunyuanVideoImageToVideoPipeline(
        text_encoder=LlavaForConditionalGeneration.from_pretrained(llava_folder),
        tokenizer=AutoTokenizer.from_pretrained(llava_folder, padding_side="right"),
        transformer=None,
        vae=None,
        scheduler=None,
        text_encoder_2=CLIPTextModel.from_pretrained(clip_folder),
        tokenizer_2=AutoTokenizer.from_pretrained(clip_folder),
        image_processor=CLIPImageProcessor.from_pretrained(llava_folder),
    )
    template = {
        "template": PICTURE_TEMPLATE.text,
        "crop_start": PICTURE_TEMPLATE.crop_start,
        "image_emb_start": 5,
        "image_emb_end": 5 + TOKENS,
        "image_emb_len": TOKENS,
    }
    images = pictures(len(CAPTIONS))
    ours = build(llava_folder, clip_folder, stride).encode(CAPTIONS, "video", images)
    assert ours.states.shape == (len(CAPTIONS), MAX_LENGTH + TOKENS // stride, TEXT_DIM)
    for row, (caption, image) in enumerate(zip(CAPTIONS, images, strict=True)):
        with torch.no_grad():
            states, pooled, mask = pipeline.encode_prompt(
                torch.from_numpy(image).permute(2, 0, 1),
                caption,
                prompt_template=template,
                device=torch.device("cpu"),
                max_sequence_length=MAX_LENGTH,
                image_embed_interleave=stride,
            )
        kept = mask[0].bool()
        assert int(kept.sum()) == int(ours.mask[row].sum()), caption
        torch.testing.assert_close(ours.states[row][ours.mask[row]], states[0][kept], **CLOSE)
        torch.testing.assert_close(ours.pooled[row], pooled[0], **CLOSE)
        assert not ours.states[row][~ours.mask[row]].any()


CLOSE = {"rtol": 0, "atol": 1e-5}


def test_a_picture_decides_and_a_caption_without_one_is_text_alone(
    llava_folder: Path, clip_folder: Path
) -> None:
    encoder = build(llava_folder, clip_folder)
    one, two = pictures(2)
    mixed = encoder.encode(CAPTIONS[:3], "video", [one, None, two])
    assert mixed.mask.sum(1).tolist()[1] == 1
    plain = build_text_encoder(config(llava_folder, clip_folder)).encode(CAPTIONS[1:2], "video")
    torch.testing.assert_close(mixed.states[1, :1], plain.states[0, :1], **CLOSE)
    swapped = encoder.encode(CAPTIONS[:1], "video", [two])
    assert (swapped.states[0] - mixed.states[0]).abs().max() > 1e-3
    assert encoder.sees_images
    assert encoder.encode(["a"], "image").mask.sum() > 0


@pytest.mark.parametrize("dtype", [EncoderDtype.bfloat16, EncoderDtype.float16])
def test_half_precision_stays_close(llava_folder: Path, clip_folder: Path, dtype) -> None:
    images = pictures(len(CAPTIONS))
    exact = build(llava_folder, clip_folder).encode(CAPTIONS, "video", images)
    half = build(llava_folder, clip_folder, dtype=dtype).encode(CAPTIONS, "video", images)
    assert half.states.isfinite().all()
    error = (
        half.states - exact.states
    ).square().mean().sqrt() / exact.states.square().mean().sqrt()
    assert 0 < error < (0.03 if dtype is EncoderDtype.bfloat16 else 0.004)


def test_what_does_not_fit_is_refused(llava_folder: Path, clip_folder: Path) -> None:
    encoder = build(llava_folder, clip_folder)
    with pytest.raises(ValueError, match="1 pictures for 2 captions"):
        encoder.encode(["a", "b"], "video", pictures(1))
    with pytest.raises(ValueError, match='only a "video" begins with one'):
        encoder.encode(["a"], "image", pictures(1))
    with pytest.raises(ValueError, match=r"makes 16 tokens of a picture.*set text.image_tokens=16"):
        build(llava_folder, clip_folder, image_tokens=576)
    plain = build_text_encoder(config(llava_folder, clip_folder))
    with pytest.raises(ValueError, match=r"sees no pictures; set text\.kind=llava"):
        plain.encode(["a"], "video", pictures(1))
    (llava_folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"has no preprocessor_config\.json"):
        build(llava_folder, clip_folder)
