"""What the digests of a checkpoint cost: their time over that of the rest of a save.

python tests/faults/price_of_digests.py        # half a minute
"""

import tempfile
import time

import numpy as np

from distill_jax import train
from distill_jax.train.checkpoints import digest


def main() -> None:
    rng = np.random.default_rng(0)
    for megabytes in (30, 200):
        tree = {str(i): rng.normal(size=megabytes * 10**6 // 32).astype(np.float32) for i in range(8)}
        with tempfile.TemporaryDirectory() as directory:
            for _ in range(3):
                begun = time.process_time()
                for array in tree.values():
                    digest(array)
                cost = time.process_time() - begun
                begun, clock = time.process_time(), time.monotonic()
                with train.Checkpoints(tempfile.mkdtemp(dir=directory)) as checkpoints:
                    checkpoints.save(0, tree, {})
                saved, clock = time.process_time() - begun, time.monotonic() - clock
                print(
                    f"{megabytes} MB: digests {cost:.3f} s, {cost / (saved - cost):.1%} of the CPU time of a save, "
                    f"{cost / (clock - cost):.1%} of its time on the clock"
                )


if __name__ == "__main__":
    main()
