"""The whole configuration of a run: one dataclass per section, each owned by its package."""

from dataclasses import dataclass, field

from hunyuan_train.checkpoint.config import CheckpointConfig
from hunyuan_train.config.curriculum import CurriculumConfig
from hunyuan_train.config.run import CertifyConfig, DemoConfig, RunSection, StageConfig
from hunyuan_train.data.config import DataConfig
from hunyuan_train.encoders.config import TextEncoderConfig
from hunyuan_train.evaluation.config import EvaluationConfig, SampleConfig
from hunyuan_train.evaluation.scaling_config import ScalingConfig
from hunyuan_train.memory.cluster import ClusterConfig
from hunyuan_train.memory.config import MemoryConfig
from hunyuan_train.models.hunyuan.config import HunyuanConfig
from hunyuan_train.models.lora_config import LoraConfig
from hunyuan_train.models.vae.config import VaeConfig
from hunyuan_train.objectives.config import FlowMatchingConfig
from hunyuan_train.objectives.vae_config import VaeTrainingConfig
from hunyuan_train.objectives.vae_loss_config import VaeLossConfig
from hunyuan_train.observability.config import LoggingConfig
from hunyuan_train.optim.config import OptimizerConfig
from hunyuan_train.parallel.config import ParallelConfig
from hunyuan_train.resilience.config import LaunchConfig, ResilienceConfig


@dataclass(kw_only=True)
class RunConfig:
    """Everything that decides what a run does."""

    run: RunSection = field(default_factory=RunSection)
    model: HunyuanConfig
    lora: LoraConfig = field(default_factory=LoraConfig)
    vae: VaeConfig
    vae_training: VaeTrainingConfig = field(default_factory=VaeTrainingConfig)
    vae_loss: VaeLossConfig = field(default_factory=VaeLossConfig)
    text: TextEncoderConfig
    data: DataConfig
    objective: FlowMatchingConfig
    optimizer: OptimizerConfig
    parallel: ParallelConfig
    memory: MemoryConfig
    checkpoint: CheckpointConfig
    resilience: ResilienceConfig
    logging: LoggingConfig
    sample: SampleConfig
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    demo: DemoConfig = field(default_factory=DemoConfig)
    certify: CertifyConfig = field(default_factory=CertifyConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
