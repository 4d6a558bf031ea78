"""Drop-in patches for trainers people already have; a host is imported only when its patch is asked for."""
