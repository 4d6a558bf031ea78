"""Drop-in patches for trainers people already have: `fastrlhf.integrations.<host>.patch()`.

Each is a function and a context manager; a host is imported only when its patch is asked for.
"""
