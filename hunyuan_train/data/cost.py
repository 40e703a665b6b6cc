"""The predicted cost of a sample, which is what batches and ranks are balanced by."""

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.models.hunyuan.config import HunyuanConfig
from hunyuan_train.observability.flops import dit_forward_flops


def sample_cost(bucket: Bucket, text_tokens: float, model: HunyuanConfig) -> float:
    """Return the training FLOPs of one sample: linear in its tokens plus attention over all.

    Args:
        bucket: Its shape.
        text_tokens: Its text tokens; padding counts where it is computed.
        model: Sizes of the diffusion transformer.
    """
    patch = model.patch_size[0] * model.patch_size[1] * model.patch_size[2]
    return float(
        dit_forward_flops(
            batch=1,
            img_tokens=bucket.tokens,
            txt_tokens=round(text_tokens),
            hidden_size=model.hidden_size,
            double_blocks=model.num_double_blocks,
            single_blocks=model.num_single_blocks,
            mlp_ratio=model.mlp_ratio,
            patch_in=model.in_channels * patch,
            patch_out=model.out_channels * patch,
            text_dim=model.text_dim,
            pooled_dim=model.pooled_dim,
            refiner_depth=model.refiner_depth,
            guidance_embed=model.guidance_embed,
        ).training
    )
