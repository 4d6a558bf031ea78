"""The ops, a file each: docstring with the equation, argument checks, schemas, fakes, autograd."""

import torch

import fastrlhf

if fastrlhf.torch_release(torch.__version__) < fastrlhf.OLDEST_TORCH:
    raise ImportError(fastrlhf.too_old(torch.__version__))
