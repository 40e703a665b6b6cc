"""HunyuanVideo: the 13B text-to-video diffusion transformer.

- double-stream blocks (image and text weights apart), then single-stream blocks (shared weights)
- given frames (image to video) in either published form: see ``ImageCondition``
- conditioning vector from time, pooled text and, in the distilled form, the guidance scale
- 3-D rotary positions on image tokens, none on text
- parameter names and shapes are the released checkpoint's

Source: HunyuanVideo, arXiv 2412.03603, section 4.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from hunyuan_train.models.hunyuan.blocks import DoubleStreamBlock, SingleStreamBlock
from hunyuan_train.models.hunyuan.config import HunyuanConfig, ImageCondition
from hunyuan_train.models.hunyuan.sharding import hunyuan_sharding_plan
from hunyuan_train.models.hunyuan.text_refiner import TextRefiner
from hunyuan_train.models.layers import (
    FinalLayer,
    GivenTokens,
    Modulation,
    PatchEmbed,
    ScalarEmbedder,
    VectorEmbedder,
    unpatchify,
)
from hunyuan_train.models.rope import RopeCache
from hunyuan_train.models.shapes import (
    FrameMask,
    Latents,
    Patches,
    PerSample,
    Pooled,
    TextMask,
    Vec,
    Velocity,
)
from hunyuan_train.models.spec import (
    ONES,
    ZEROS,
    InitKind,
    InitRule,
    fan_in_uniform,
    xavier_uniform,
)
from hunyuan_train.models.tokens import TokenLayout, WholeTokens


class HunyuanVideo(nn.Module):
    """HYVideo-T/2, with a guidance embedder when ``cfg.guidance_embed``.

    Construct it anywhere, ``meta`` included; after ``to_empty`` call ``init_weights``.
    """

    def __init__(self, cfg: HunyuanConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.sharding_plan = hunyuan_sharding_plan(cfg)
        self.img_in = PatchEmbed(cfg.patch_size, cfg.in_channels, cfg.hidden_size)
        self.txt_in = TextRefiner(cfg)
        self.time_in = ScalarEmbedder(cfg.hidden_size)
        self.vector_in = VectorEmbedder(cfg.pooled_dim, cfg.hidden_size)
        self.guidance_in = ScalarEmbedder(cfg.hidden_size) if cfg.guidance_embed else None
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(cfg) for _ in range(cfg.num_double_blocks)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(cfg) for _ in range(cfg.num_single_blocks)
        )
        self.final_layer = FinalLayer(cfg.hidden_size, cfg.out_channels * cfg.patch_volume)
        self.rope_cache = RopeCache(list(cfg.rope_axes), cfg.rope_theta)
        self.tokens: TokenLayout = WholeTokens()
        self.init_weights()

    @property
    def repeated_blocks(self) -> list[nn.Module]:
        """The units of the sharding plan, in execution order."""
        return self.sharding_plan.modules(self)

    def init_rules(self) -> dict[str, InitRule]:
        """Return the published initial value of every parameter, by name.

        | parameters | value |
        |---|---|
        | every modulation, the final projection | 0, so the initial output is exactly 0 |
        | patch projection | Xavier uniform on its flattened weight, bias 0 |
        | weights of the time and guidance embedders | N(0, 0.02^2) |
        | norms | 1, bias 0 |
        | the rest | framework default U(-1/sqrt(fan_in), 1/sqrt(fan_in)), biases too |
        """
        rules: dict[str, InitRule] = {}
        for name, module in self.named_modules():
            match module:
                case nn.Linear():
                    fan_in = fan_in_uniform(module.in_features)
                    rules |= {f"{name}.weight": fan_in, f"{name}.bias": fan_in}
                case nn.LayerNorm():
                    rules |= {f"{name}.weight": ONES, f"{name}.bias": ZEROS}
                case nn.RMSNorm():
                    rules[f"{name}.weight"] = ONES
                case PatchEmbed():
                    fan_in = self.cfg.in_channels * self.cfg.patch_volume
                    xavier = xavier_uniform(fan_in, self.cfg.hidden_size)
                    rules |= {f"{name}.proj.weight": xavier, f"{name}.proj.bias": ZEROS}
                case _:
                    continue
        for name, module in self.named_modules():
            if isinstance(module, ScalarEmbedder):
                normal = InitRule(InitKind.NORMAL, 0.02)
                rules |= {f"{name}.mlp.0.weight": normal, f"{name}.mlp.2.weight": normal}
            elif isinstance(module, Modulation):
                rules |= {f"{name}.linear.weight": ZEROS, f"{name}.linear.bias": ZEROS}
            elif name.endswith("adaLN_modulation"):
                rules |= {f"{name}.1.weight": ZEROS, f"{name}.1.bias": ZEROS}
        return rules | {"final_layer.linear.weight": ZEROS, "final_layer.linear.bias": ZEROS}

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fill every parameter in place as published; see ``init_rules``.

        Args:
            generator: source of the random numbers, on the parameters' device; the global one if
                None.
        """
        rules = self.init_rules()
        for name, parameter in self.named_parameters():
            rules[name].fill(parameter, generator)

    def forward(
        self,
        latents: Latents,
        time: PerSample,
        text: Tensor,
        text_mask: TextMask | None,
        pooled: Pooled,
        guidance: PerSample | None = None,
        given: FrameMask | None = None,
    ) -> Velocity:
        """Predict the velocity ``noise - latents`` of noised latents.

        Args:
            latents: scaled, noised latents [B, C, T, H, W]; T, H, W multiples of the patch. Given
                frames hold their clean latents where ``given`` is taken; with
                ``image_condition=concat`` the channels are noised latents, given latents (0 in
                other frames) and a mask, C = 2 out_channels + 1.
            time: 1000 * sigma, [B], float32 (bfloat16 rounds 986.4 to 988).
            text: states of the language model [B, L, text_dim].
            text_mask: [B, L] bool, True for valid tokens, right padded; None when every token of
                every sample is valid, which avoids attention masks. Its values are not looked at
                here (that would stall the device), so check it where the batch is made: a sample
                without a valid token yields NaN. ``trim_text`` cuts what no sample needs.
            pooled: pooled text vector [B, pooled_dim].
            guidance: 1000 * guidance scale, [B], float32; exactly when ``cfg.guidance_embed``.
            given: [B, T], True for latent frames that are given, None if none are; with
                ``image_condition=token_replace`` alone. Tokens of these are modulated as at time 0
                and without guidance in every block; what the model predicts for them means nothing.

        Returns:
            Velocity [B, out_channels, T, H, W] in the weights' dtype.

        Raises:
            ValueError: a shape does not fit the config, or guidance is missing or not taken.
        """
        grid = self._check_inputs(latents, text, pooled, guidance, given)
        vec, vecs = self._conditioning(time, pooled, guidance, given is not None)  # [B, D]
        patches = self.img_in.cut(latents)  # [B, N, F]
        img_tokens, txt_tokens = patches.shape[1], text.shape[1]
        img = self.img_in(self.tokens.shard_img(patches))  # [B, N, D]
        txt = self.txt_in(text, time, text_mask)  # [B, L, D]
        txt = self.tokens.shard_txt(txt, txt_tokens)
        rope = self.rope_cache.get(grid, txt_tokens, latents.device)
        apart, joined = self.tokens.rows(rope, text_mask, img_tokens, txt_tokens)

        of_img, of_all = None, None
        if given is not None and vecs is not None:
            of_img, of_all = self._given_tokens(given, vecs, grid, patches, txt.shape[1])

        for block in self.double_blocks:
            img, txt = block(img, txt, vec, apart.rope, apart.key_mask, of_img)
        x = torch.cat([img, txt], dim=1)  # [B, N+L, D]
        for block in self.single_blocks:
            x = block(x, vec, joined.rope, joined.key_mask, of_all)
        out = self.final_layer(x[:, : img.shape[1]], vec)  # [B, N, F]
        return unpatchify(self.tokens.gather_img(out, img_tokens), grid, self.cfg.patch_size)

    def _conditioning(
        self, time: PerSample, pooled: Pooled, guidance: PerSample | None, given: bool
    ) -> tuple[Vec, Tensor | None]:
        """Return the conditioning [B, D]; with given frames also beside theirs, [B, 2, D]."""
        if not given:
            embedded, clean = self.time_in(time), None
        else:
            embedded, clean = self.time_in(torch.cat([time, torch.zeros_like(time)])).chunk(2)
        pooled = self.vector_in(pooled)
        vec = embedded + pooled
        if self.guidance_in is not None:
            vec = vec + self.guidance_in(guidance)
        return vec, None if clean is None else torch.stack([vec, clean + pooled], dim=1)

    def _given_tokens(
        self,
        given: FrameMask,
        vecs: Tensor,
        grid: tuple[int, int, int],
        patches: Patches,
        txt_rows: int,
    ) -> tuple[GivenTokens, GivenTokens]:
        """Return which of this device's image tokens, and of its joint tokens, are given."""
        tokens = given[..., None].expand(-1, -1, grid[1] * grid[2]).flatten(1)  # [B, N]
        mine = self.tokens.shard_img(tokens[..., None].to(patches.dtype))[..., 0] > 0
        joint = functional.pad(mine, (0, txt_rows))
        return GivenTokens(vecs, mine), GivenTokens(vecs, joint)

    def _check_inputs(
        self,
        latents: Tensor,
        text: Tensor,
        pooled: Tensor,
        guidance: Tensor | None,
        given: Tensor | None,
    ) -> tuple[int, int, int]:
        """Check shapes (never values) and return the token grid (t, h, w)."""
        cfg = self.cfg
        if latents.dim() != 5 or latents.shape[1] != cfg.in_channels:
            raise ValueError(
                f"latents have shape {list(latents.shape)}, but the model takes "
                f"[B, {cfg.in_channels}, T, H, W]"
            )
        for axis, size, patch in zip("THW", latents.shape[2:], cfg.patch_size, strict=True):
            if size % patch:
                raise ValueError(
                    f"latent {axis}={size} is not a multiple of the patch's {patch}; "
                    "pixel heights and widths must be multiples of 16"
                )
        for field, dim, tensor in (
            ("text_dim", cfg.text_dim, text),
            ("pooled_dim", cfg.pooled_dim, pooled),
        ):
            if tensor.shape[-1] != dim:
                raise ValueError(
                    f"text features have width {tensor.shape[-1]}, but model.{field}={dim}; "
                    "use the features this model was configured for"
                )
        if (guidance is not None) != cfg.guidance_embed:
            raise ValueError(
                f"guidance was {'not ' if guidance is None else ''}given, but "
                f"model.guidance_embed={str(cfg.guidance_embed).lower()}"
            )
        if given is not None and cfg.image_condition is not ImageCondition.token_replace:
            raise ValueError(
                f"given frames were passed, but model.image_condition={cfg.image_condition}; only "
                "token_replace takes their mask"
            )
        if given is not None and given.shape != (latents.shape[0], latents.shape[2]):
            raise ValueError(
                f"the mask of given frames has shape {list(given.shape)}, but the latents are "
                f"{latents.shape[0]} samples of {latents.shape[2]} frames"
            )
        t, h, w = (s // p for s, p in zip(latents.shape[2:], cfg.patch_size, strict=True))
        return t, h, w
