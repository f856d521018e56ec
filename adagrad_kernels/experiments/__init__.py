"""The training run behind the command line: data, models, training, pictures."""
