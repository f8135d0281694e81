"""What all experiments share: options, the run with its checkpoints, results, pictures."""

from harness.experiment import (
    Run,
    Trained,
    adam,
    arrays,
    config_of_data,
    jittered,
    labelled,
    load,
    mnist_or_digits,
    plain,
    prepare,
    rise_and_fall,
    shifted_views,
)
from harness.options import Amount, Count, Dropout, Options, Positive, RunOptions, Share, Whole, read
from harness.runs import run_main

__all__ = [
    "Amount", "Count", "Dropout", "Options", "Positive", "Run", "RunOptions", "Share", "Trained", "Whole", "adam",
    "arrays", "config_of_data", "jittered", "labelled", "load", "mnist_or_digits", "plain", "prepare",
    "read", "rise_and_fall", "run_main", "shifted_views",
]  # fmt: skip
