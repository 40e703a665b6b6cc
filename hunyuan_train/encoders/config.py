"""The `text` section: which text encoder makes the conditioning of a run."""

from dataclasses import dataclass
from enum import StrEnum


class TextEncoderKind(StrEnum):
    """The text encoders that exist."""

    builtin = "builtin"
    hunyuan = "hunyuan"
    llava = "llava"


class EncoderDtype(StrEnum):
    """Precision the weights of a text encoder are held in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass(kw_only=True, slots=True)
class TextEncoderConfig:
    """Which text encoder to build, and the sizes the diffusion model expects from it."""

    kind: TextEncoderKind = TextEncoderKind.hunyuan
    """`hunyuan`: LLaMA-3-8B and CLIP-L from local folders; `llava`: the same, and the encoder sees
    the first frame of a video beside its caption; `builtin`: word vectors, no weights."""
    llm_folder: str = ""
    """Folder with the LLaMA-3-8B language part and its tokenizer; `llava` needs the whole
    llava-llama-3-8b-v1_1 with its image processor, which `hunyuan` takes too."""
    clip_folder: str = ""
    """Folder with CLIP-L (openai/clip-vit-large-patch14) and its tokenizer."""
    max_length: int = 256
    """Text tokens per caption; longer captions are cut."""
    text_dim: int = 4096
    """Width of a token state; must match `model.text_dim`."""
    pooled_dim: int = 768
    """Width of the pooled vector; must match `model.pooled_dim`."""
    image_tokens: int = 576
    """`llava` only: tokens that its vision part makes of a picture."""
    image_stride: int = 2
    """`llava` only: one image token of so many is kept. Published: 2 for model.image_condition=
    concat, 4 for token_replace, 1 otherwise."""
    dtype: EncoderDtype = EncoderDtype.float16
    """Precision of the encoders' weights; the features are float32 either way."""
    batch_size: int = 8
    """Captions that pass through the encoders at once; they are of like length."""
    expectations: str = ""
    """File with what the encoders should make of fixed inputs, for `doctor encoders`; empty: beside
    the weights of text.llm_folder."""

    def __post_init__(self) -> None:
        """Reject sizes that no encoder can produce."""
        for name in (
            "max_length",
            "text_dim",
            "pooled_dim",
            "batch_size",
            "image_tokens",
            "image_stride",
        ):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"text.{name}={value} must be at least 1")

    @property
    def sees_images(self) -> bool:
        """Whether the features of a video depend on its first frame."""
        return self.kind is TextEncoderKind.llava

    @property
    def length(self) -> int:
        """Tokens of the features at most: those of the text, and the image tokens that are kept."""
        return self.max_length + self.kept_image_tokens

    @property
    def kept_image_tokens(self) -> int:
        """Image tokens in the features of a video."""
        return -(-self.image_tokens // self.image_stride) if self.sees_images else 0
