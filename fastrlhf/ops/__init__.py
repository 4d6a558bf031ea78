"""One file an op: equation, checks, registration, autograd, choice of backend."""
