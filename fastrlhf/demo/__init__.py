"""The demo: restaurant records, their labeler, and the pipeline from a base model to a report."""
