"""The text encoder of the released image-to-video model: it sees the first frame too.

Source: HunyuanVideo-I2V, its published inference settings.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPImageProcessor

from hunyuan_train.encoders.config import TextEncoderConfig
from hunyuan_train.encoders.features import Images, TextFeatures
from hunyuan_train.encoders.hunyuan import HunyuanTextEncoder, put_tokens
from hunyuan_train.encoders.templates import (
    IMAGE_PLACEHOLDER,
    PICTURE_TEMPLATE,
    check_crop,
    check_media,
    check_template,
)

_PROCESSOR = "preprocessor_config.json"
_HEADERS = 3
"""System, user and assistant; a prompt that was cut has lost the last."""
_CUT = 4
"""Tokens of the assistant's header, with the end of the turn before it, that are left out."""


class LlavaTextEncoder(HunyuanTextEncoder):
    """LLaVA-LLaMA-3-8B behind the released image-to-video template, and CLIP-L on the caption.

    The features of a video with a picture are one image token of every `text.image_stride`, then
    the tokens of the caption and the line break that closes the prompt. Without a picture they are
    those of `HunyuanTextEncoder`.
    """

    sees_images = True

    def __init__(self, cfg: TextEncoderConfig, device: torch.device | str = "cpu") -> None:
        """Load both encoders and the image processor from local folders.

        Args:
            cfg: folders, sizes and precision.
            device: where the encoders run and the features are returned.

        Raises:
            ValueError: a folder or file is missing, holds another model, or has other sizes than
                `cfg`; or the template differs from the released one.
        """
        super().__init__(cfg, device)
        check_template("image-to-video", PICTURE_TEMPLATE)
        check_crop("image-to-video", PICTURE_TEMPLATE, self._llm_tokenizer, cfg.llm_folder)
        self._stride = cfg.image_stride
        self._image_tokens = cfg.image_tokens
        self._processor = _load_processor(cfg.llm_folder)
        self._image_token = _image_token(self._whole.config, self._llm_tokenizer, cfg.llm_folder)
        self._header_end = self._llm_tokenizer.convert_tokens_to_ids("<|end_header_id|>")
        found = _count_image_tokens(self._whole.config)
        if found != cfg.image_tokens:
            raise ValueError(
                f"text.llm_folder={cfg.llm_folder} makes {found} tokens of a picture, but "
                f"text.image_tokens={cfg.image_tokens}; set text.image_tokens={found}"
            )

    @torch.no_grad()
    def encode(self, captions: list[str], media: str, images: Images | None = None) -> TextFeatures:
        """Encode B captions, `text.batch_size` at a time; see `TextEncoder.encode`."""
        check_media(media)
        images = images or [None] * len(captions)
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} pictures for {len(captions)} captions; give one each")
        seen = [row for row, image in enumerate(images) if image is not None]
        if seen and media != "video":
            raise ValueError(f'media={media!r} with a picture; only a "video" begins with one')
        blind = [row for row, image in enumerate(images) if image is None]
        if not seen:
            return super().encode(captions, media)
        features = self._empty_features(len(captions))
        if blind:
            found = super().encode([captions[row] for row in blind], media)
            features.states[blind], features.mask[blind] = found.states, found.mask
        self._add_pictured(features, seen, captions, images)
        self._add_pooled(features, captions)
        return features

    def _add_pictured(
        self, features: TextFeatures, seen: list[int], captions: list[str], images: Images
    ) -> None:
        """Fill in the states of the rows ``seen``, which have pictures."""
        tokens = self._tokenize([captions[row] for row in seen], PICTURE_TEMPLATE)
        expanded = [self._expand(row) for row in tokens]
        for rows in self._batches(expanded):
            pictures = [images[seen[row]] for row in rows]
            pixels = self._pixels([picture for picture in pictures if picture is not None])
            batch = [expanded[row] for row in rows]
            states = self._run(self._whole, batch, pixel_values=pixels)
            for row, found in zip(rows, states, strict=True):
                put_tokens(features, seen[row], found[self._kept(tokens[row])])

    def _pixels(self, pictures: list[np.ndarray]) -> Tensor:
        """Return pictures as the vision part takes them, [B, 3, size, size]."""
        pixels = self._processor(pictures, return_tensors="pt")["pixel_values"]
        return pixels.to(self._device, self._whole.dtype)

    def _expand(self, tokens: list[int]) -> list[int]:
        """Put a place for every image token where the one placeholder is."""
        start = tokens.index(self._image_token)
        image = [self._image_token] * self._image_tokens
        return [*tokens[:start], *image, *tokens[start + 1 :]]

    def _kept(self, tokens: list[int]) -> list[int]:
        """Return which places of an expanded prompt become features.

        Args:
            tokens: The prompt with one placeholder.
        """
        start, shift = tokens.index(self._image_token), self._image_tokens - 1
        ends = [place for place, token in enumerate(tokens) if token == self._header_end]
        last = ends[-1] if len(ends) >= _HEADERS else len(tokens) - 1
        text = [
            *range(PICTURE_TEMPLATE.crop_start, last + 1 - _CUT),
            *range(last + 1, len(tokens)),
        ]
        image = range(start, start + self._image_tokens, self._stride)
        return [*image, *(place + shift for place in text)]


def _load_processor(folder: str) -> Any:
    """Load what resizes, crops and normalises pictures."""
    try:
        return CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
    except OSError as error:
        raise ValueError(
            f"text.llm_folder={folder} has no {_PROCESSOR}; put that of llava-llama-3-8b-v1_1 there"
        ) from error


def _image_token(config: Any, tokenizer: Any, folder: str) -> int:
    """Return the number of the placeholder, on which model and tokenizer have to agree."""
    model = getattr(config, "image_token_index", None) or getattr(config, "image_token_id", None)
    found = tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
    if model is None or found != model:
        raise ValueError(
            f"the tokenizer in text.llm_folder={folder} has number {found} for "
            f"{IMAGE_PLACEHOLDER}, its config.json {model}; copy the tokenizer files of "
            "llava-llama-3-8b-v1_1"
        )
    return int(model)


def _count_image_tokens(config: Any) -> int:
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    return patches + (config.vision_feature_select_strategy == "full")
