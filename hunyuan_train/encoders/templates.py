"""The prompt templates of the released text encoders.

The wording is part of the interface of the published weights: the diffusion model was trained on
hidden states computed behind exactly these instructions. Each template therefore carries its length
and SHA-256, and `check_template` refuses a copy that has drifted by one character.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

MEDIA = ("image", "video")
"""What a caption may describe; one frame is an image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptTemplate:
    """One instruction prompt around a caption."""

    text: str
    """The prompt, with `{}` where the caption goes."""
    crop_start: int
    """LLaMA-3 tokens in front of the caption (begin-of-text included); cut from the features."""
    num_chars: int
    """Length of `text`."""
    sha256: str
    """SHA-256 of `text` in UTF-8."""

    @property
    def prefix(self) -> str:
        """The part in front of the caption."""
        return self.text.split("{}", maxsplit=1)[0]

    def fill(self, caption: str) -> str:
        """Return the prompt for one caption; braces inside the caption stay as they are."""
        before, after = self.text.split("{}", maxsplit=1)
        return before + caption + after


def _turns(instruction: str) -> str:
    return (
        f"<|start_header_id|>system<|end_header_id|>\n\n{instruction}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    )


TEMPLATES = {
    "image": PromptTemplate(
        text=_turns(
            "Describe the image by detailing the color, shape, size, texture, quantity, text, "
            "spatial relationships of the objects and background:"
        ),
        crop_start=36,
        num_chars=241,
        sha256="e6794c248e31c8efee73f33028bbb095324ec79e0b05dfae78b373b0abd4fb98",
    ),
    "video": PromptTemplate(
        # The missing spaces after "video.", "objects." and "atmosphere." are in the original.
        text=_turns(
            "Describe the video by detailing the following aspects: "
            "1. The main content and theme of the video."
            "2. The color, shape, size, texture, quantity, text, and spatial relationships of the "
            "objects."
            "3. Actions, events, behaviors temporal relationships, physical movement changes of "
            "the objects."
            "4. background environment, light, style and atmosphere."
            "5. camera angles, movements, and transitions used in the video:"
        ),
        crop_start=95,
        num_chars=512,
        sha256="a52f68dde3637b127592fffe9e2483a5d0563987a49db6ddb9b06146f2ba7cb5",
    ),
}

IMAGE_PLACEHOLDER = "<image>"
PICTURE_TEMPLATE = PromptTemplate(
    text=(
        f"<|start_header_id|>system<|end_header_id|>\n\n{IMAGE_PLACEHOLDER}\n"
        "Describe the video by detailing the following aspects according to the reference image: "
        "1. The main content and theme of the video."
        "2. The color, shape, size, texture, quantity, text, and spatial relationships of the "
        "objects."
        "3. Actions, events, behaviors temporal relationships, physical movement changes of "
        "the objects."
        "4. background environment, light, style and atmosphere."
        "5. camera angles, movements, and transitions used in the video:<|eot_id|>\n\n"
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    crop_start=103,
    num_chars=602,
    sha256="7f45a330cc8fa70b613010c4fb6b4315a991c39eef7a405df46cb2591a547a21",
)
"""For a video whose first frame is shown to the encoder; the placeholder is one token."""


def check_media(media: str) -> None:
    """Raise ValueError unless `media` is "image" or "video"."""
    if media not in MEDIA:
        raise ValueError(f'media={media!r} is not known; use "image" (one frame) or "video"')


def check_template(media: str, template: PromptTemplate) -> None:
    """Raise ValueError unless the template is the released one, character by character."""
    digest = hashlib.sha256(template.text.encode()).hexdigest()
    if len(template.text) != template.num_chars or digest != template.sha256:
        raise ValueError(
            f"the {media} prompt template has {len(template.text)} characters and SHA-256 "
            f"{digest}, the released one has {template.num_chars} and {template.sha256}; "
            f"restore its text in encoders/templates.py"
        )


def check_crop(media: str, template: PromptTemplate, tokenizer: Any, folder: str) -> None:
    """Raise ValueError unless the tokenizer puts the caption at the token the weights expect.

    A tokenizer that adds no begin-of-text token, or knows the header markers only as plain text,
    would shift every caption silently.
    """
    found = len(tokenizer(template.prefix)["input_ids"])
    if found != template.crop_start:
        raise ValueError(
            f"the tokenizer in text.llm_folder={folder} makes {found} tokens of the {media} prompt "
            f"in front of the caption, the released weights expect {template.crop_start}; put the "
            f"LLaMA-3 tokenizer of llava-llama-3-8b-v1_1 there, with its begin-of-text token on"
        )
