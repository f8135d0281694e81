"""Training: objectives, the train step, the epoch, the loop with checkpoints, and several devices."""

from distill_jax._cpu import compiler_options, keep_memory
from distill_jax.train import federated, interpolation, sweeps
from distill_jax.train.checkpoints import Checkpoints
from distill_jax.train.epoch import epoch_order, make_epoch, scan_is_fast
from distill_jax.train.feature_objectives import attach_learned, detach_learned, distill_features
from distill_jax.train.loop import Fit, History, fit, make_measure, make_validation
from distill_jax.train.objectives import Schedule, distill, distill_each, error_rate, supervised
from distill_jax.train.parallel import data_mesh, replicated, sharded, use_cpu_devices
from distill_jax.train.peers import (
    attach_mean_teacher,
    detach_mean_teacher,
    mean_teacher,
    mutual,
    self_distillation,
)
from distill_jax.train.stages import (
    Stage,
    Staged,
    converged,
    encoder_decoder,
    freeze,
    mean_squares,
    train_stages,
)
from distill_jax.train.step import (
    Batch,
    LossFn,
    Metrics,
    Step,
    TrainState,
    batch_weight,
    init_state,
    make_train_step,
    max_norm,
    step_key,
    weighted_mean,
)
from distill_jax.train.text_objectives import (
    distill_tokens,
    exposure,
    next_token,
    on_policy,
    predicted,
    token_weight,
)

__all__ = [
    "Batch", "Checkpoints", "Fit", "History", "LossFn", "Metrics", "Schedule", "Stage", "Staged", "Step",
    "TrainState", "attach_learned", "attach_mean_teacher", "batch_weight", "compiler_options", "converged",
    "data_mesh", "detach_learned", "detach_mean_teacher", "distill", "distill_each", "distill_features",
    "distill_tokens", "encoder_decoder", "epoch_order", "error_rate", "exposure", "federated", "fit", "freeze",
    "init_state", "interpolation", "keep_memory", "make_epoch", "make_measure", "make_train_step",
    "make_validation", "max_norm", "mean_squares", "mean_teacher", "mutual", "next_token", "on_policy", "predicted",
    "replicated", "scan_is_fast", "self_distillation", "sharded", "step_key", "supervised", "sweeps",
    "token_weight", "train_stages", "use_cpu_devices", "weighted_mean",
]  # fmt: skip
