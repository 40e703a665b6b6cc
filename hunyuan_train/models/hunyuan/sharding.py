"""How HunyuanVideo is spread over devices, as data."""

from hunyuan_train.models.hunyuan.config import HunyuanConfig
from hunyuan_train.models.spec import Cut, LinearCut, ShardingPlan


def hunyuan_sharding_plan(cfg: HunyuanConfig) -> ShardingPlan:
    """Return the plan: every refiner, double and single block is one unit.

    Attention is divided by head and every MLP by hidden unit; modulations, 26.5 % of the released
    model, are divided by output channel and their small outputs gathered. Only norms and the two
    64-channel projections stay whole.
    """
    hidden, mlp = cfg.hidden_size, cfg.mlp_size
    qkv = (hidden, hidden, hidden)
    refiner = (f"txt_in.individual_token_refiner.blocks.{r}" for r in range(cfg.refiner_depth))
    double = (f"double_blocks.{i}" for i in range(cfg.num_double_blocks))
    single = (f"single_blocks.{j}" for j in range(cfg.num_single_blocks))
    return ShardingPlan(
        units=(*refiner, *double, *single),
        cuts=(
            LinearCut("*_attn_qkv", Cut.COLUMN, qkv),
            LinearCut("*_attn_proj", Cut.ROW),
            LinearCut("single_blocks.*.linear1", Cut.COLUMN, (*qkv, mlp)),
            LinearCut("single_blocks.*.linear2", Cut.ROW, (hidden, mlp)),
            LinearCut("*mlp.fc1", Cut.COLUMN),
            LinearCut("*mlp.fc2", Cut.ROW),
            LinearCut("*_mod.linear", Cut.GATHERED),
            LinearCut("*.modulation.linear", Cut.GATHERED),
            LinearCut("*adaLN_modulation.1", Cut.GATHERED),
            LinearCut("txt_in.input_embedder", Cut.GATHERED),
            LinearCut("*_in.mlp.0", Cut.VECTOR_COLUMN),
            LinearCut("*_in.mlp.2", Cut.VECTOR_ROW),
            LinearCut("txt_in.t_embedder.mlp.0", Cut.VECTOR_COLUMN),
            LinearCut("txt_in.t_embedder.mlp.2", Cut.VECTOR_ROW),
            LinearCut("txt_in.c_embedder.linear_1", Cut.VECTOR_COLUMN),
            LinearCut("txt_in.c_embedder.linear_2", Cut.VECTOR_ROW),
            LinearCut("vector_in.in_layer", Cut.VECTOR_COLUMN),
            LinearCut("vector_in.out_layer", Cut.VECTOR_ROW),
        ),
        per_head=("*q_norm.weight", "*k_norm.weight"),
        per_token=("img_in.*", "final_layer.linear.*", "txt_in.*.norm1.*", "txt_in.*.norm2.*"),
        token_modules=("", "txt_in"),
        core_modules=("double_blocks.*", "single_blocks.*"),
        divisors=(("model.num_heads", cfg.num_heads), ("model.hidden_size * mlp_ratio", mlp)),
    )
