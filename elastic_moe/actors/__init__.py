"""Ray's side of a run: actors, the driver, the cluster."""

import os

os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")  # before ray.train is imported, in every process
