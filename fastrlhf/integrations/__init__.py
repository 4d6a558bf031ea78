"""Patches for third-party trainers: `fastrlhf.integrations.<package>.patch()` runs their functions on our ops.

The packages are trl, transformers, verl and openrlhf. `patch()` returns a handle that is also a context manager. A
package is imported when it is patched, not before. `_patch` describes what is checked and when a patch is refused.
"""


class PatchError(RuntimeError):
    """A function to replace is missing or has other parameters than expected; nothing was patched."""
