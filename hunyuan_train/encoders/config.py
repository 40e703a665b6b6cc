"""The `text` section: which text encoder makes the conditioning of a run."""

from dataclasses import dataclass
from enum import StrEnum


class TextEncoderKind(StrEnum):
    """The text encoders that exist."""

    builtin = "builtin"
    hunyuan = "hunyuan"


class EncoderDtype(StrEnum):
    """Precision the weights of a text encoder are held in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass(kw_only=True, slots=True)
class TextEncoderConfig:
    """Which text encoder to build, and the sizes the diffusion model expects from it."""

    kind: TextEncoderKind = TextEncoderKind.hunyuan
    """`hunyuan`: LLaMA-3-8B and CLIP-L from local folders; `builtin`: word vectors, no weights."""
    llm_folder: str = ""
    """`hunyuan` only: folder with the LLaMA-3-8B language part and its tokenizer."""
    clip_folder: str = ""
    """`hunyuan` only: folder with CLIP-L (openai/clip-vit-large-patch14) and its tokenizer."""
    max_length: int = 256
    """Text tokens per caption; longer captions are cut."""
    text_dim: int = 4096
    """Width of a token state; must match `model.text_dim`."""
    pooled_dim: int = 768
    """Width of the pooled vector; must match `model.pooled_dim`."""
    dtype: EncoderDtype = EncoderDtype.float16
    """`hunyuan` only: precision of the encoder weights; the features are float32 either way."""
    batch_size: int = 8
    """`hunyuan` only: captions that pass through the encoders at once."""

    def __post_init__(self) -> None:
        """Reject sizes that no encoder can produce."""
        for name in ("max_length", "text_dim", "pooled_dim", "batch_size"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"text.{name}={value} must be at least 1")
