"""Floor 3: the train pipeline, the trainer, metrics, traffic counts and the report."""
