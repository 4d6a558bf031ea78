"""The ops, a file each: docstring with the equation, argument checks, schemas, fakes, autograd."""
