"""The embedded default: restaurant records, their labeler, and the whole run on two CPU cores."""
