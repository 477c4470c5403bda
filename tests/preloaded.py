"""What every process of `tests.warm` has: the package, and the libraries that it imports late."""

import gc

import distributed  # noqa: F401
import s3fs  # type: ignore[import-untyped]  # noqa: F401
import torch
import torch._dynamo  # with the first optimizer
import torchvision  # type: ignore[import-untyped]  # noqa: F401

from tests.stage_one.apart import import_package

import_package()
torch.set_num_threads(1)  # as Dask has its workers do by a variable, which is read at the start
gc.collect()
gc.freeze()  # a collection writes into all that it looks at, which every fork would copy
