"""Training: objectives, the train step, the epoch, the loop with its checkpoints, several devices."""

from distill_jax.train import interpolation
from distill_jax.train.checkpoints import Checkpoints, tree_differences
from distill_jax.train.epoch import epoch_order, make_epoch, scan_is_fast
from distill_jax.train.loop import Fit, History, fit, make_validation
from distill_jax.train.objectives import (
    distill,
    distill_features,
    drop_learned,
    encoder_decoder,
    errors,
    init_learned,
    mean_squares,
    student_of,
    supervised,
)
from distill_jax.train.parallel import data_mesh, replicated, sharded, use_cpu_devices
from distill_jax.train.peers import chain, init_mean_teacher, mean_teacher, mutual, self_distillation
from distill_jax.train.several_teachers import distill_each, distill_gated, init_gate
from distill_jax.train.stages import (
    STAGES,
    Stage,
    Staged,
    check_original,
    converged,
    make_measure,
    only,
    train_stages,
)
from distill_jax.train.step import (
    LossFn,
    TrainState,
    batch_weight,
    init_state,
    make_eval_step,
    make_train_step,
    max_norm,
    step_key,
    weighted_mean,
)

__all__ = [
    "STAGES", "Checkpoints", "Fit", "History", "LossFn", "Stage", "Staged", "TrainState",
    "batch_weight", "chain", "check_original", "converged", "data_mesh", "distill", "distill_each",
    "distill_features", "distill_gated", "drop_learned", "encoder_decoder", "epoch_order", "errors",
    "fit", "init_gate", "init_learned", "init_mean_teacher", "init_state", "interpolation",
    "make_epoch", "make_eval_step", "make_measure", "make_train_step", "make_validation", "max_norm",
    "mean_squares", "mean_teacher", "mutual", "only", "replicated", "scan_is_fast",
    "self_distillation", "sharded", "step_key", "student_of", "supervised", "train_stages",
    "tree_differences", "use_cpu_devices", "weighted_mean",
]  # fmt: skip
