"""The text encoders of the released model: LLaMA-3-8B token states and CLIP-L pooled vectors.

Source: HunyuanVideo, arXiv 2412.03603, section 4.3, and the published inference settings.
"""

import hashlib
import logging
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, CLIPTextModel

from hunyuan_train.encoders.config import TextEncoderConfig
from hunyuan_train.encoders.features import Images, TextFeatures, refuse_images
from hunyuan_train.encoders.templates import (
    MEDIA,
    PICTURE_TEMPLATE,
    TEMPLATES,
    PromptTemplate,
    check_crop,
    check_media,
    check_template,
)
from hunyuan_train.encoders.weights import LLM, check_folders, folder_fingerprint

logger = logging.getLogger(__name__)

SKIPPED_LAYERS = 2
"""The features are `hidden_states[-3]`: the last two layers and the final norm take no part."""
CLIP_LENGTH = 77
_VERSION = "hunyuan-1"


class HunyuanTextEncoder:
    """LLaMA-3-8B behind the released prompt templates, and CLIP-L on the bare caption.

    Token states come from the third last entry of the language model's hidden states, without its
    final norm, after the template's leading tokens are cut. An empty caption keeps the template's
    closing token, so no caption is without tokens. CLIP reads the first 77 tokens of the caption.

    Captions pass in batches of like length, padded to the longest of the batch: on the right of
    causal attention, padding changes nothing but the time it takes.
    """

    sees_images = False

    def __init__(self, cfg: TextEncoderConfig, device: torch.device | str = "cpu") -> None:
        """Load both encoders from local folders.

        Args:
            cfg: folders, sizes and precision.
            device: where the encoders run and the features are returned.

        Raises:
            ValueError: a folder or file is missing, holds another model, or has other sizes than
                `cfg`; or a prompt template differs from the released one.
        """
        for complaint in check_folders(cfg):
            raise ValueError(complaint)
        self.text_length = cfg.length
        self._max_length = cfg.max_length
        self.text_dim = cfg.text_dim
        self.pooled_dim = cfg.pooled_dim
        self._batch_size = cfg.batch_size
        self._device = torch.device(device)
        self._warned = False
        self._llm_tokenizer = _load_tokenizer("text.llm_folder", cfg.llm_folder)
        for media in MEDIA:
            check_template(media, TEMPLATES[media])
            check_crop(media, TEMPLATES[media], self._llm_tokenizer, cfg.llm_folder)
        self._clip_tokenizer = _load_tokenizer("text.clip_folder", cfg.clip_folder)
        model = _load_llm(cfg).to(self._device)
        self._whole = model
        self._llm = getattr(model, "language_model", model)  # the language part of a full LLaVA
        self._clip = _load_clip(cfg).to(self._device)
        self.fingerprint = _fingerprint(cfg)

    @torch.no_grad()
    def encode(self, captions: list[str], media: str, images: Images | None = None) -> TextFeatures:
        """Encode B captions, `text.batch_size` at a time; see `TextEncoder.encode`."""
        check_media(media)
        refuse_images(images, "hunyuan")
        return self._encode_texts(captions, TEMPLATES[media])

    def _encode_texts(self, captions: list[str], template: PromptTemplate) -> TextFeatures:
        tokens = self._tokenize(captions, template)
        features = self._empty_features(len(captions))
        for rows in self._batches(tokens):
            states = self._run(self._llm, [tokens[row] for row in rows])
            for row, found in zip(rows, states, strict=True):
                put_tokens(features, row, found[template.crop_start : len(tokens[row])])
        self._add_pooled(features, captions)
        return features

    def _tokenize(self, captions: list[str], template: PromptTemplate) -> list[list[int]]:
        """Return the token ids of the prompts, without padding."""
        if not captions:
            raise ValueError("there are no captions to encode")
        prompts = [template.fill(caption) for caption in captions]
        length = self._max_length + template.crop_start
        tokens = self._llm_tokenizer(prompts, truncation=True, max_length=length)["input_ids"]
        self._report_cut_captions(captions, prompts, tokens, length)
        return tokens

    def _batches(self, tokens: list[list[int]]) -> list[list[int]]:
        """Return the rows of each batch, short ones first."""
        order = sorted(range(len(tokens)), key=lambda row: len(tokens[row]))
        size = self._batch_size
        return [order[start : start + size] for start in range(0, len(order), size)]

    def _run(self, model: nn.Module, tokens: list[list[int]], **more: Tensor) -> Tensor:
        """Return the states [B, L, D] of prompts, padded on the right to the longest."""
        ids, mask = self._padded(tokens, self._llm_tokenizer.pad_token_id)
        # No key-value cache: it would hold 128 kB per token for a model that never generates.
        return model(input_ids=ids, attention_mask=mask, use_cache=False, **more).last_hidden_state

    def _padded(self, tokens: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
        """Return ids and mask, both [B, L] int64, L of the longest row."""
        longest = max(map(len, tokens))
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in tokens])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in tokens])
        return ids.to(self._device), mask.to(self._device)

    def _empty_features(self, count: int) -> TextFeatures:
        place = self._device
        return TextFeatures(
            states=torch.zeros(count, self.text_length, self.text_dim, device=place),
            mask=torch.zeros(count, self.text_length, dtype=torch.bool, device=place),
            pooled=torch.zeros(count, self.pooled_dim, device=place),
        )

    def _add_pooled(self, features: TextFeatures, captions: list[str]) -> None:
        """Fill in the pooled vectors of CLIP."""
        tokenizer = self._clip_tokenizer
        tokens = tokenizer(captions, truncation=True, max_length=CLIP_LENGTH)["input_ids"]
        for rows in self._batches(tokens):
            ids, _ = self._padded([tokens[row] for row in rows], tokenizer.pad_token_id)
            features.pooled[rows] = self._clip(input_ids=ids).pooler_output.float()

    def _report_cut_captions(
        self, captions: list[str], prompts: list[str], tokens: list[list[int]], length: int
    ) -> None:
        """Warn about the first caption that does not fit; only full rows can be cut ones."""
        if self._warned:
            return
        for row, kept in enumerate(tokens):
            if len(kept) < length:
                continue
            needed = len(self._llm_tokenizer(prompts[row])["input_ids"])
            if needed > length:
                self._warned = True
                logger.warning(
                    "a caption is %d tokens longer than text.max_length=%d and is cut "
                    "(later cuts stay silent): %.80s",
                    needed - length,
                    self._max_length,
                    captions[row],
                )
                return


def put_tokens(features: TextFeatures, row: int, states: Tensor) -> None:
    """Write the states [L, D] of a caption's tokens into ``features``."""
    features.states[row, : len(states)] = states.float()
    features.mask[row, : len(states)] = True


def _load_tokenizer(field: str, folder: str) -> Any:
    """Load a tokenizer that pads and cuts on the right, as the diffusion model assumes."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # Set here, not in the folder: LLaMA tokenizers are often saved with left padding.
    tokenizer.padding_side = "right"
    tokenizer.truncation_side = "right"
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer in {field}={folder} has no padding token; copy the tokenizer files of "
            f"the released encoder (tokenizer_config.json names its pad_token)"
        )
    return tokenizer


def _load_llm(cfg: TextEncoderConfig) -> nn.Module:
    """Load the language model without what comes after `hidden_states[-3]`.

    Dropping the last two layers and the norm makes the plain output of the stack the wanted states:
    neither the 33 intermediate states nor the unused layers take memory.
    """
    model = _from_pretrained(AutoModel, "text.llm_folder", cfg.llm_folder, cfg)
    language = getattr(model, "language_model", model)
    _check_width("text.llm_folder", cfg.llm_folder, language, "text.text_dim", cfg.text_dim)
    num_layers = len(language.layers)
    if num_layers <= SKIPPED_LAYERS:
        raise ValueError(
            f"text.llm_folder={cfg.llm_folder} has {num_layers} layers; the features come from the "
            f"layer {SKIPPED_LAYERS} before the last, so put {LLM} there"
        )
    language.layers = language.layers[:-SKIPPED_LAYERS]
    language.norm = nn.Identity()
    if hasattr(model, "vision_tower") and not cfg.sees_images:
        model = language
    return model.eval().requires_grad_(False)


def _load_clip(cfg: TextEncoderConfig) -> nn.Module:
    """Load the text half of CLIP; a folder with the full CLIP works too."""
    model = _from_pretrained(CLIPTextModel, "text.clip_folder", cfg.clip_folder, cfg)
    _check_width("text.clip_folder", cfg.clip_folder, model, "text.pooled_dim", cfg.pooled_dim)
    return model.eval().requires_grad_(False)


def _from_pretrained(kind: Any, field: str, folder: str, cfg: TextEncoderConfig) -> Any:
    """Load a model and refuse one with weights missing: transformers would make those up."""
    try:
        model, report = kind.from_pretrained(
            folder,
            local_files_only=True,
            dtype=getattr(torch, cfg.dtype),
            output_loading_info=True,
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{field}={folder} cannot be loaded ({error}); copy its weights again"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{field}={folder} has no weights for {len(missing)} tensors, {missing[0]} among them; "
            f"save the model again with the transformers version that made it"
        )
    return model


def _check_width(field: str, folder: str, model: Any, size_field: str, size: int) -> None:
    found = model.config.hidden_size
    if found != size:
        raise ValueError(
            f"{field}={folder} has hidden size {found}, but {size_field}={size}; set {size_field} "
            f"to {found} (and the model's) or put another encoder there"
        )


def _fingerprint(cfg: TextEncoderConfig) -> str:
    parts = [
        _VERSION,
        str(cfg.max_length),
        str(cfg.dtype),
        *(TEMPLATES[media].sha256 for media in MEDIA),
        *([f"{PICTURE_TEMPLATE.sha256}:{cfg.image_stride}"] if cfg.sees_images else []),
        folder_fingerprint(cfg.llm_folder),
        folder_fingerprint(cfg.clip_folder),
    ]
    return f"{_VERSION}-{hashlib.sha256(':'.join(parts).encode()).hexdigest()[:16]}"
