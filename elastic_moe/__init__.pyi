"""The names that `__init__.py` imports when they are first used, for type checkers."""

from elastic_moe.api.run import Run as Run
from elastic_moe.api.settings import configure as configure
from elastic_moe.api.training import TrainingFailed as TrainingFailed
from elastic_moe.api.training import train as train
from elastic_moe.config.schema import TrainConfig as TrainConfig
from elastic_moe.errors import StorageFailed as StorageFailed
from elastic_moe.errors import UserError as UserError

__version__: str
