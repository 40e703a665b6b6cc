"""Which tokens a device works on, and the seam where sequence sharding replaces that."""

from typing import Any, NamedTuple, Protocol

from hunyuan_train.models.attention import joint_key_mask
from hunyuan_train.models.rope import Rope
from hunyuan_train.models.shapes import Patches, TextMask, TxtTokens


class Rows(NamedTuple):
    """What attention needs to know of the rows it is given, besides their values."""

    rope: Rope
    """One row of the rotary table for each of them."""
    key_mask: Any
    """Which keys exist, in the form the installed cores take ([B, S] by default); None when all
    do."""


class TokenLayout(Protocol):
    """How a model spreads its tokens; every method is differentiable.

    A replacement keeps both streams in shards along their own sequence. ``shard_*`` go from whole
    tokens to this device's, ``gather_img`` comes back. Rows may be padded and in any order, as long
    as ``rows`` describes them.
    """

    def shard_img(self, patches: Patches) -> Patches:
        """Return this device's rows of [B, N, F]."""
        ...

    def enter_refiner(
        self, txt: TxtTokens, text_mask: TextMask | None
    ) -> tuple[TxtTokens, TextMask | None]:
        """Return the rows the text refiner works on, and the mask of the keys it attends to."""
        ...

    def shard_txt(self, txt: TxtTokens, txt_tokens: int) -> TxtTokens:
        """Return this device's rows of the refiner's output for ``txt_tokens`` text tokens."""
        ...

    def rows(
        self, rope: Rope, text_mask: TextMask | None, img_tokens: int, txt_tokens: int
    ) -> tuple[Rows, Rows]:
        """Describe the rows attention sees in double blocks and in single blocks.

        Args:
            rope: table of the N image tokens followed by the L text tokens.
            text_mask: [B, L] of the whole text, or None.
            img_tokens: N.
            txt_tokens: L.
        """
        ...

    def gather_img(self, patches: Patches, img_tokens: int) -> Patches:
        """Return all N rows from this device's."""
        ...


class WholeTokens:
    """The default layout: every token is on this device, in order."""

    def shard_img(self, patches: Patches) -> Patches:
        """Return all rows."""
        return patches

    def enter_refiner(
        self, txt: TxtTokens, text_mask: TextMask | None
    ) -> tuple[TxtTokens, TextMask | None]:
        """Return all rows and the mask as it is."""
        return txt, text_mask

    def shard_txt(self, txt: TxtTokens, txt_tokens: int) -> TxtTokens:
        """Return all rows."""
        return txt

    def rows(
        self, rope: Rope, text_mask: TextMask | None, img_tokens: int, txt_tokens: int
    ) -> tuple[Rows, Rows]:
        """Return the same for both kinds of block: image tokens, then text tokens."""
        rows = Rows(rope, joint_key_mask(text_mask, img_tokens))
        return rows, rows

    def gather_img(self, patches: Patches, img_tokens: int) -> Patches:
        """Return all rows."""
        return patches
