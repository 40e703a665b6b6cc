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
from hunyuan_train.encoders.features import TextFeatures, concatenate
from hunyuan_train.encoders.templates import (
    MEDIA,
    TEMPLATES,
    PromptTemplate,
    check_crop,
    check_media,
    check_template,
)
from hunyuan_train.encoders.weights import check_folder, folder_fingerprint

logger = logging.getLogger(__name__)

SKIPPED_LAYERS = 2
"""The features are `hidden_states[-3]`: the last two layers and the final norm take no part."""
CLIP_LENGTH = 77
_VERSION = "hunyuan-1"
_LLM = "the LLaMA-3-8B language part of xtuner/llava-llama-3-8b-v1_1-transformers"
_CLIP = "openai/clip-vit-large-patch14"


class HunyuanTextEncoder:
    """LLaMA-3-8B behind the released prompt templates, and CLIP-L on the bare caption.

    Token states come from the third last entry of the language model's hidden states, without its
    final norm, after the template's leading tokens are cut. An empty caption keeps the template's
    closing token, so no caption is without tokens. CLIP reads the first 77 tokens of the caption.
    """

    def __init__(self, cfg: TextEncoderConfig, device: torch.device | str = "cpu") -> None:
        """Load both encoders from local folders.

        Args:
            cfg: folders, sizes and precision.
            device: where the encoders run and the features are returned.

        Raises:
            ValueError: a folder or file is missing, holds another model, or has other sizes than
                `cfg`; or a prompt template differs from the released one.
        """
        check_folder("text.llm_folder", cfg.llm_folder, _LLM, ("llama", "llava"))
        check_folder("text.clip_folder", cfg.clip_folder, _CLIP, ("clip", "clip_text_model"))
        self.text_length = cfg.max_length
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
        self._llm = _load_llm(cfg).to(self._device)
        self._clip = _load_clip(cfg).to(self._device)
        self.fingerprint = _fingerprint(cfg)

    @torch.no_grad()
    def encode(self, captions: list[str], media: str) -> TextFeatures:
        """Encode B captions, `text.batch_size` at a time; see `TextEncoder.encode`."""
        check_media(media)
        if not captions:
            raise ValueError("there are no captions to encode")
        return concatenate(
            [
                self._encode_batch(captions[start : start + self._batch_size], TEMPLATES[media])
                for start in range(0, len(captions), self._batch_size)
            ]
        )

    def _encode_batch(self, captions: list[str], template: PromptTemplate) -> TextFeatures:
        prompts = [template.fill(caption) for caption in captions]
        length = self.text_length + template.crop_start
        tokens, mask = _tokenize(self._llm_tokenizer, prompts, length)
        self._report_cut_captions(captions, prompts, mask, length)
        # No key-value cache: it would hold 128 kB per token for a model that never generates.
        states = self._llm(
            input_ids=tokens.to(self._device),
            attention_mask=mask.to(self._device),
            use_cache=False,
        ).last_hidden_state[:, template.crop_start :]  # [B, L, D]
        kept = mask[:, template.crop_start :].bool().to(self._device)
        clip_tokens, _ = _tokenize(self._clip_tokenizer, captions, CLIP_LENGTH)
        pooled = self._clip(input_ids=clip_tokens.to(self._device)).pooler_output
        return TextFeatures(
            states=states.float().masked_fill(~kept[:, :, None], 0.0),
            mask=kept,
            pooled=pooled.float(),
        )

    def _report_cut_captions(
        self, captions: list[str], prompts: list[str], mask: Tensor, length: int
    ) -> None:
        """Warn about the first caption that does not fit; only full rows can be cut ones."""
        if self._warned:
            return
        for row in mask.all(dim=1).nonzero().flatten().tolist():
            needed = len(self._llm_tokenizer(prompts[row])["input_ids"])
            if needed > length:
                self._warned = True
                logger.warning(
                    "a caption is %d tokens longer than text.max_length=%d and is cut "
                    "(later cuts stay silent): %.80s",
                    needed - length,
                    self.text_length,
                    captions[row],
                )
                return


def _tokenize(tokenizer: Any, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
    """Return token ids and mask, both [B, length] int64, padded on the right."""
    batch = tokenizer(
        texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    return batch["input_ids"], batch["attention_mask"]


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
    model = getattr(model, "language_model", model)  # the language part of a full LLaVA
    _check_width("text.llm_folder", cfg.llm_folder, model, "text.text_dim", cfg.text_dim)
    num_layers = len(model.layers)
    if num_layers <= SKIPPED_LAYERS:
        raise ValueError(
            f"text.llm_folder={cfg.llm_folder} has {num_layers} layers; the features come from the "
            f"layer {SKIPPED_LAYERS} before the last, so put {_LLM} there"
        )
    model.layers = model.layers[:-SKIPPED_LAYERS]
    model.norm = nn.Identity()
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
        folder_fingerprint(cfg.llm_folder),
        folder_fingerprint(cfg.clip_folder),
    ]
    return f"{_VERSION}-{hashlib.sha256(':'.join(parts).encode()).hexdigest()[:16]}"
